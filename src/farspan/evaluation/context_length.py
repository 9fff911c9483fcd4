r"""Perplexity by context length, beyond the length a model was trained on. Four protocols, never mixed in one number.

All of them read the same texts of L tokens, so that every length is measured on the same tokens:

* **sliding window** (width W, stride S): windows of W tokens start at 0, S, 2S, …; the first one scores all its tokens,
  later ones the last S only, so that every token is scored once: PPL(W) = exp(Σ NLL / tokens). For W ≤ S these are
  plain chunks of W.
* **position**: one pass over all L tokens; the mean NLL of the tokens at positions 2^k … 2^(k+1) - 1. It falls as long
  as more context helps, and rises where the model does not carry beyond its trained length.
* **suffix**: the same last n tokens of every text, after prefixes of growing length.
* **carried state**: windows of the trained length, one after another, with the memory carried over; only for models
  whose memory does not grow. Labelled as such, because no window starts fresh.

A cell that gives inf or NaN, or runs out of memory, is a result: it says so and the rest goes on.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from farspan.evaluation.memory import is_out_of_memory
from farspan.evaluation.scoring import Scorer, Stretch, evaluating, perplexity

if TYPE_CHECKING:
    from farspan.models import FarspanConfig

PROTOCOLS = ("sliding", "position", "suffix", "carried")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Cell:
    """One measured number.

    Attributes:
        start: first position (position protocol) or 0.
        length: tokens of context at most, the scored one included; for positions, the end of the range.
        tokens: number of tokens scored.
        nll: their total cost in nats.
        status: `ok`, `inf`, `nan` or `out of memory`.
    """

    start: int
    length: int
    tokens: int
    nll: float
    status: str

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(nll / tokens)`."""
        return perplexity(self.nll, self.tokens)


Texts = Sequence[np.ndarray]
"""Texts of L + 1 tokens each: L inputs, and the L labels one place further on."""


def sliding_window(score: Scorer, texts: Texts, length: int, stride: int) -> Cell:
    """The cell of one window width; `stride` is cut to `length`."""

    def stretches() -> Iterator[Stretch]:
        for text in texts:
            for start, end, scored in window_spans(len(text) - 1, length, stride):
                yield Stretch(text[start:end], text[start + 1 : end + 1], skip=scored - start)

    return _cell(length, lambda: score(stretches(), length))


def window_spans(total: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over `total` tokens as (start, end, first token it scores); every token is scored exactly once."""
    stride = min(stride, length)
    start = scored = 0
    while scored < total:
        end = min(start + length, total)
        yield start, end, scored
        start, scored = start + stride, end


def by_position(score: Scorer, texts: Texts) -> list[Cell]:
    """The cells of the position protocol, ranges that double from 16 tokens on."""
    edges = position_edges(len(texts[0]) - 1)
    costs: list[np.ndarray] = []
    whole = _cell(edges[-1], lambda: _keep(score((Stretch(text[:-1], text[1:]) for text in texts), edges[-1]), costs))
    if whole.status == OUT_OF_MEMORY:
        return [whole]
    by_text = np.stack(costs).astype(np.float64)
    pairs = itertools.pairwise(edges)
    return [
        _measured(start, end, by_text[:, start:end].size, float(by_text[:, start:end].sum())) for start, end in pairs
    ]


def position_edges(length: int) -> list[int]:
    """0, 16, 32, 64, … up to and including `length`."""
    edges = [0, *(1 << power for power in range(4, length.bit_length()))]
    return [edge for edge in edges if edge < length] + [length]


def fixed_suffix(score: Scorer, texts: Texts, length: int, suffix: int) -> Cell:
    """The cost of the last `suffix` tokens of every text when they and what precedes them are `length` tokens."""
    stretches = (Stretch(text[-length - 1 : -1], text[-length:], skip=length - suffix) for text in texts)
    return _cell(length, lambda: score(stretches, length))


def carried_state(score: Scorer, texts: Texts, window: int) -> Cell:
    """The cost of all tokens, read in windows of `window` tokens with the memory carried over."""
    return _cell(len(texts[0]) - 1, lambda: _read_on(score, texts, window))


def _read_on(score: Scorer, texts: Texts, window: int) -> Iterator[np.ndarray]:
    length = len(texts[0]) - 1
    rows = max(1, score.batch_tokens // window)
    for first in range(0, len(texts), rows):
        batch = torch.from_numpy(np.stack(texts[first : first + rows])).to(score.model.device)
        memory = score.model.new_cache(length)
        for start in range(0, length, window):
            end = min(start + window, length)
            with evaluating(score.model), score.autocast():
                out = score.model.model(input_ids=batch[:, start:end], past_key_values=memory, use_cache=True)
            yield score.head(out.last_hidden_state, batch[:, start + 1 : end + 1])
            score.advance(len(batch) * (end - start))


def memory_is_bounded(config: "FarspanConfig") -> bool:
    """Whether the decoding memory of every layer stays the same size however long the text is."""
    return {"linear_attention", "sliding_attention"}.issuperset(config.layer_types)


def _cell(length: int, run: Callable[[], Iterator[np.ndarray]]) -> Cell:
    """Adds up what `run` yields; running out of memory is a result."""
    nll, tokens = 0.0, 0
    try:
        for costs in run():
            nll += float(costs.sum(dtype=np.float64))
            tokens += costs.size
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Cell(0, length, 0, math.nan, OUT_OF_MEMORY)
    return _measured(0, length, tokens, nll)


def _measured(start: int, length: int, tokens: int, nll: float) -> Cell:
    value = perplexity(nll, tokens)
    status = "nan" if math.isnan(value) else "inf" if math.isinf(value) else "ok"
    return Cell(start, length, tokens, nll, status)


def _keep(costs: Iterator[np.ndarray], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    for piece in costs:
        kept.append(piece)
        yield piece
