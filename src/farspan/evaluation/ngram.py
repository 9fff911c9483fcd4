"""An n-gram model of bytes: the baseline that any language model has to beat."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

END_OF_DOCUMENT = 256
VOCABULARY = 257
_BITS = 9  # of a symbol inside a key
MAX_ORDER = 63 // _BITS


@dataclass(frozen=True)
class _Order:
    """The statistics of one order: sorted n-grams and sorted contexts."""

    grams: np.ndarray  # int64, sorted
    discounted: np.ndarray  # float64, count minus discount
    contexts: np.ndarray  # int64, sorted
    totals: np.ndarray  # float64, counts after a context
    backoff: np.ndarray  # float64, the discounts taken after a context


class NgramModel:
    r"""Interpolated modified Kneser-Ney model of bytes, with one more symbol for the end of a document.

    With `c_k` the count of an n-gram of order `k` (for the highest order its occurrences, below it the number of
    distinct symbols seen to its left), `D` the discount for a count of 1, 2 or at least 3 and `h'` the context `h`
    without its oldest symbol,

        p_k(w | h) = (max(c_k(h w) - D(c_k(h w)), 0) + B_k(h) · p_{k-1}(w | h')) / Σ_v c_k(h v),
        B_k(h) = Σ_v D(c_k(h v)),    p_0 = 1 / 257,

    and `p_k(w | h) = p_{k-1}(w | h')` for a context never seen, so that the 257 probabilities sum to 1 after every
    context. A document starts with a context of end-of-document symbols only: nothing is remembered across documents.

    Args:
        order: length of the longest n-gram, the predicted byte included; 1 to 7.

    Cost: fitting sorts one 8-byte key per byte of training text, O(n log n); scoring is a binary search per order.

    Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 4.1.
    """

    def __init__(self, order: int = 6) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order={order} is not accepted; choose 1 to {MAX_ORDER}.")
        self.order = order
        self._orders: list[_Order] = []

    def fit(self, documents: Iterable[bytes]) -> "NgramModel":
        """Counts the n-grams of the documents; returns the model itself."""
        grams, counts = np.unique(self._keys(documents), return_counts=True)
        orders = []
        for order in range(self.order, 0, -1):
            orders.append(_statistics(grams, counts))
            shorter = grams & _mask(order - 1)
            grams, counts = np.unique(shorter, return_counts=True)
        self._orders = orders[::-1]
        return self

    def bits(self, documents: Iterable[bytes]) -> float:
        """The code length of the documents in bits, the end of each document included."""
        keys, repeats = np.unique(self._keys(documents), return_counts=True)
        return float(-(repeats * np.log2(self._probabilities(keys))).sum())

    def distribution(self, context: bytes | Sequence[int]) -> np.ndarray:
        """The probabilities of the 256 bytes and the end of the document after the beginning of a document, `[257]`."""
        past = [END_OF_DOCUMENT] * (self.order - 1) + list(context)
        key = 0
        for symbol in past[len(past) - self.order + 1 :]:
            key = (key << _BITS) | symbol
        return self._probabilities((np.int64(key) << _BITS) | np.arange(VOCABULARY, dtype=np.int64))

    def _probabilities(self, keys: np.ndarray) -> np.ndarray:
        """`p(w | h)` for n-grams of the highest order; fast when they are sorted."""
        result = np.full(len(keys), 1.0 / VOCABULARY)
        for order, table in enumerate(self._orders, start=1):
            grams = keys & _mask(order)
            at, seen = _find(table.contexts, grams >> _BITS)
            gram, counted = _find(table.grams, grams)
            kept = np.where(counted, table.discounted[gram], 0.0)
            result = np.where(seen, (kept + table.backoff[at] * result) / table.totals[at], result)
        return result

    def _keys(self, documents: Iterable[bytes]) -> np.ndarray:
        """One key per predicted symbol: the newest symbol in the lowest bits, then its context."""
        parts = [_document_keys(document, self.order) for document in documents]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _mask(order: int) -> np.int64:
    return np.int64((1 << (_BITS * order)) - 1)


def _document_keys(document: bytes, order: int) -> np.ndarray:
    symbols = np.full(len(document) + order, END_OF_DOCUMENT, np.int64)
    symbols[order - 1 : -1] = np.frombuffer(document, np.uint8)
    count = len(document) + 1
    keys = symbols[:count].copy()
    for start in range(1, order):
        keys <<= _BITS
        keys |= symbols[start : start + count]
    return keys


def _statistics(grams: np.ndarray, counts: np.ndarray) -> _Order:
    """Discounts the counts of one order and sums them by context; `grams` are sorted, so contexts are contiguous."""
    if not len(grams):
        empty = np.zeros(1)
        return _Order(np.full(1, -1), empty, np.full(1, -1), empty + 1, empty)
    discount = _discounts(counts)[np.minimum(counts, 3)]
    contexts, starts = np.unique(grams >> _BITS, return_index=True)
    return _Order(
        grams=grams,
        discounted=counts - discount,
        contexts=contexts,
        totals=np.add.reduceat(counts.astype(np.float64), starts),
        backoff=np.add.reduceat(discount, starts),
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """The discounts for counts of 0, 1, 2 and more, estimated from how many n-grams were counted 1 to 4 times."""
    once, twice, thrice, four = (int(np.count_nonzero(counts == count)) for count in (1, 2, 3, 4))
    if not (once and twice and thrice and four):  # too little data to estimate: plain absolute discounting
        return np.array([0.0, 0.5, 0.5, 0.5])
    ratio = once / (once + 2 * twice)
    raw = [1 - 2 * ratio * twice / once, 2 - 3 * ratio * thrice / twice, 3 - 4 * ratio * four / thrice]
    return np.array([0.0, *(min(max(value, 0.1), n - 0.1) for n, value in enumerate(raw, start=1))])


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of `keys` in a sorted table, and whether each is there (the place of a missing key is any valid one)."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys
