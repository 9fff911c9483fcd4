"""Which texts, lengths and windows an evaluation by context length reads, within a budget of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from farspan.errors import ConfigError, DataError, nearest
from farspan.evaluation.context_length import PROTOCOLS, window_spans
from farspan.evaluation.perplexity import spread

if TYPE_CHECKING:
    from farspan.data.dataset import Split

STRIDE = 512
FEWEST_TEXTS = 4
SHORTEST = 16
FACTORS = (0.25, 0.5, 1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Attributes:
        lengths: context lengths, rising.
        trained: the trained length.
        stride: step of the sliding window.
        suffix: scored tokens of the suffix protocol.
        protocols: names of `PROTOCOLS`.
        kind: what the texts are: `documents`, each cut to the greatest length, or `concatenated documents`.
        texts: tokens of each text, `[lengths[-1] + 1]`.
    """

    lengths: tuple[int, ...]
    trained: int
    stride: int
    suffix: int
    protocols: tuple[str, ...]
    kind: str
    texts: list[np.ndarray]

    @property
    def tokens(self) -> int:
        """Tokens that the model will read."""
        return len(self.texts) * _cost(self.lengths, self.stride, self.protocols)


def make_plan(
    split: "Split",
    *,
    trained: int,
    end_of_document: int,
    lengths: Sequence[int] = (),
    stride: int | None = None,
    protocols: Sequence[str] = PROTOCOLS,
    max_tokens: int = 500_000,
) -> Plan:
    """Chooses lengths and texts.

    Texts are documents of at least the greatest length, cut to it, when there are four of them; otherwise all documents
    of the split end to end, cut into texts of that length. Lengths that were asked for are measured, if need be on a
    single text; the default ones are those of trained · (¼ … 8) for which there are four texts within the budget.

    Args:
        split: a split of a prepared dataset.
        trained: the trained length.
        end_of_document: id of the token between documents.
        lengths: context lengths; empty for the default.
        stride: step of the sliding window; None is 512, or the trained length where that is shorter.
        protocols: what to measure.
        max_tokens: tokens the model may read; decides how many texts are read, at least one. It has to hold the
            greatest length; the windows over that one text may overlap beyond it.

    Raises:
        ConfigError: for a length, stride, budget or protocol that makes no sense.
        DataError: when the split is too short for the lengths asked for.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise ConfigError(f"protocol {protocol!r} is not known; {nearest(protocol, PROTOCOLS)}")
    if not protocols:
        raise ConfigError(f"protocols: none is named; {nearest('', PROTOCOLS)}")
    for name, value in (("stride", stride), ("max_tokens", max_tokens), *(("lengths", length) for length in lengths)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not accepted; it has to be at least 1.")
    stride = stride or min(STRIDE, trained)
    total = len(split.data.tokens)
    if lengths:
        chosen = tuple(sorted(set(lengths)))
        if chosen[-1] > total:
            raise DataError(
                f"length {chosen[-1]} is longer than the whole {split.name} split, which has {total} tokens; "
                "ask for shorter lengths or evaluate on more data."
            )
    else:
        chosen = tuple(int(trained * factor) for factor in FACTORS if trained * factor >= SHORTEST) or (trained,)
        while len(chosen) > 1 and (
            FEWEST_TEXTS * chosen[-1] > total or FEWEST_TEXTS * _cost(chosen, stride, protocols) > max_tokens
        ):
            chosen = chosen[:-1]
        if chosen[-1] > total:
            chosen = (total,)
    if chosen[-1] > max_tokens:
        raise ConfigError(
            f"max_tokens={max_tokens} is not enough for one text of {chosen[-1]} tokens; give that many or more, or "
            "shorter lengths."
        )
    affordable = max(1, max_tokens // max(1, _cost(chosen, stride, protocols)))
    kind, texts = _texts(split, chosen[-1], affordable, end_of_document)
    suffix = max(1, min(128, chosen[0] // 2))
    return Plan(chosen, trained, stride, suffix, tuple(protocols), kind, texts)


def _texts(split: "Split", length: int, most: int, end_of_document: int) -> tuple[str, list[np.ndarray]]:
    """What the texts are, and at most `most` of them, spread over the split."""
    sizes = np.diff(split.starts)  # the end of each document is one of its predictions
    long = np.flatnonzero(sizes >= length)
    if len(long) >= FEWEST_TEXTS:
        kind, starts = "documents", split.starts[long]
    else:
        kind, starts = "concatenated documents", np.arange(len(split.data.tokens) // length) * length
    chosen = [int(starts[index]) for index in spread(len(starts), most)]
    return kind, [_cut(split.data.tokens, start, length, end_of_document) for start in chosen]


def _cut(tokens: np.ndarray, start: int, length: int, end_of_document: int) -> np.ndarray:
    """`length + 1` tokens from the one before `start` on; before the first stands an end-of-document token."""
    before = tokens[start - 1] if start else end_of_document
    return np.concatenate(([before], tokens[start : start + length])).astype(np.int64)


def _cost(lengths: Sequence[int], stride: int, protocols: Sequence[str]) -> int:
    """Tokens read per text."""
    longest = lengths[-1]
    costs = {
        "sliding": sum(end - start for length in lengths for start, end, _ in window_spans(longest, length, stride)),
        "position": longest,
        "suffix": sum(lengths),
        "carried": longest,
    }
    return sum(costs[protocol] for protocol in protocols)
