r"""Bits per byte: the one number by which language models on the same text compare, whatever their tokenizer.

Defined once, for training, evaluation and reports alike. A document of tokens t_0 … t_{n-1} is the sequence
[EOD, t_0, …, t_{n-1}, EOD] with n + 1 predictions: the end-of-document token starts it and has to be predicted at its
end. The predictions are cut into windows of the trained length that do not overlap; every window starts with an empty
memory. With the NLL in nats over all predictions and the UTF-8 bytes of the texts alone,

    bits per byte = Σ NLL / (ln 2 · Σ bytes),    perplexity = exp(Σ NLL / predictions).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch

from farspan.errors import ConfigError, DataError
from farspan.evaluation.scoring import Document, Scorer, Stretch, ignore_progress, perplexity, with_boundaries

if TYPE_CHECKING:
    from farspan.models import FarspanForCausalLM


@dataclass(frozen=True)
class BitsPerByte:
    """The cost of some documents under a model.

    Attributes:
        nll: total cost in nats, ends of documents included.
        tokens: number of predictions.
        bytes: UTF-8 bytes of the scored text; a part of a document counts by its share of the predictions.
        windows: number of windows scored.
        all_windows: number of windows of the documents; more than `windows` when only a sample was scored.
        window: predictions per window.
    """

    nll: float
    tokens: int
    bytes: float
    windows: int
    all_windows: int
    window: int

    @property
    def bits_per_byte(self) -> float:
        """`nll / (ln 2 · bytes)`."""
        return self.nll / (math.log(2) * self.bytes) if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(nll / tokens)`, per token."""
        return perplexity(self.nll, self.tokens)


def bits_per_byte(
    model: "FarspanForCausalLM",
    documents: Iterable[Document],
    *,
    window: int,
    end_of_document: int,
    batch_tokens: int = 8192,
    max_windows: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = ignore_progress,
) -> BitsPerByte:
    """Measures bits per byte as defined at the head of this module.

    Args:
        model: the language model.
        documents: texts as tokens with their size in bytes; see `PreparedDataset.documents`.
        window: predictions per window, the trained length.
        end_of_document: id of the token between documents.
        batch_tokens: tokens per forward pass; windows are packed into it, so short documents cost no padding.
        max_windows: score only so many windows, spread evenly over all of them; the same ones every time. None: all.
        device: where to run; None leaves the model where it is.
        dtype: autocast dtype, None for the dtype of the weights. Head and softmax are float32 in any case.
        advance: called with the number of tokens after each forward pass.

    Returns:
        The totals, from which bits per byte and perplexity follow.

    Raises:
        DataError: when there is no document.
        ConfigError: when `window` or `max_windows` is below 1.
    """
    for name, value in (("window", window), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not accepted; it has to be at least 1.")
    if device is not None:
        model.to(device)
    texts = list(documents)
    sizes = [-(-_predictions(text, end_of_document) // window) for text in texts]
    total = sum(sizes)
    if not total:
        raise DataError("there is no document to evaluate; choose a split that holds some.")
    chosen = spread(total, max_windows)
    pieces = list(_windows(texts, sizes, chosen, window, end_of_document))
    score = Scorer(model, batch_tokens, dtype, advance)
    nll = sum(float(costs.sum(dtype=np.float64)) for costs in score((stretch for stretch, _ in pieces), window))
    size = math.fsum(size for _, size in pieces) if len(chosen) < total else sum(text.bytes for text in texts)
    return BitsPerByte(nll, sum(len(stretch.labels) for stretch, _ in pieces), size, len(chosen), total, window)


def spread(total: int, wanted: int | None) -> Sequence[int]:
    """`wanted` of the numbers 0 … total - 1 at even distances, all of them when `wanted` is None or not smaller."""
    if wanted is None or wanted >= total:
        return range(total)
    return [(2 * place + 1) * total // (2 * wanted) for place in range(wanted)]


def _predictions(document: Document, end_of_document: int) -> int:
    ended = len(document.tokens) > 0 and document.tokens[-1] == end_of_document
    return len(document.tokens) + (not ended)


def _windows(
    documents: Sequence[Document], sizes: Sequence[int], chosen: Sequence[int], window: int, end_of_document: int
) -> Iterator[tuple[Stretch, float]]:
    """The chosen windows of documents that have `sizes` windows each, with the bytes that count for each."""
    ends = np.cumsum(sizes)
    numbers = np.searchsorted(ends, chosen, side="right")
    for number, group in groupby(zip(numbers.tolist(), chosen, strict=True), key=itemgetter(0)):
        document = documents[number]
        tokens = with_boundaries(document.tokens, end_of_document)
        first = int(ends[number]) - sizes[number]
        for _, index in group:
            start = (index - first) * window
            end = min(start + window, len(tokens) - 1)
            share = (end - start) / (len(tokens) - 1)
            yield Stretch(tokens[start:end], tokens[start + 1 : end + 1]), document.bytes * share
