"""Which rows a dilated pattern selects: segments, offsets of the heads, and the pieces that a computation runs over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.ops import varlen
from farspan.ops.dilated.rotation import rotation_table

OFFSET_RULES = ("mod", "block", "none")
PAD_MODES = ("mask", "zero_keys")
Span = tuple[int, int]


@dataclass(frozen=True)
class DilatedSettings:
    """All of one call but queries, keys, values and boundaries.

    Attributes:
        patterns: pairs (segment length w, dilation r).
        head_offset: rule that gives each head its offset, one of `OFFSET_RULES`.
        causal: whether a query sees only keys up to its own place.
        scale: factor on the scores.
        dropout: probability of dropping an attention weight.
        detach_mixture_weights: whether the weights between patterns are constants in backward.
        zero_keys: whether ragged segments are filled with rows of zeros, as torchscale does.
        distance_bias: `[H, 2M − 1]`, added to the scores by distance; None is none.
        frequencies, growth: `[K/2]`, how channel pairs turn and grow per position; None for both is not at all.
    """

    patterns: tuple[tuple[int, int], ...]
    head_offset: str = "mod"
    causal: bool = True
    scale: float = 1.0
    dropout: float = 0.0
    detach_mixture_weights: bool = False
    zero_keys: bool = False
    distance_bias: Tensor | None = None
    frequencies: Tensor | None = None
    growth: Tensor | None = None

    def filling(self, spans: Sequence[Span]) -> bool:
        """Whether `zero_keys` makes a difference for these sequences.

        Causal queries come before the rows that fill the last segment, so there only rows between segments matter.
        """
        if not self.zero_keys:
            return False
        ragged = False
        for start, end in spans:
            for segment, dilation in self.patterns:
                width = max(1, min(segment, end - start))
                between = width % dilation != 0 and end - start > width
                behind = (end - start) % width != 0 or width % dilation != 0
                ragged = ragged or between or (behind and not self.causal)
        return ragged

    def window(self, spans: Sequence[Span]) -> int | None:
        """Tokens of a run, counted from the start of each sequence, that holds whole segments alone; None if unknown.

        All places in a run can be counted from its middle: a query and its keys lie in the same one.
        """
        widest = max(segment for segment, _ in self.patterns)
        longest = max([1] + [end - start for start, end in spans])
        if longest > widest and any(widest % segment for segment, _ in self.patterns):
            return None
        return min(widest, longest)

    def rotations(self, query_places: Tensor, key_places: Tensor) -> tuple[Tensor, Tensor] | None:
        """Tables that turn queries and keys at these places, or None when positions do not turn them."""
        if self.frequencies is None or self.growth is None:
            return None
        queries = rotation_table(query_places, self.frequencies, self.growth)
        return queries, rotation_table(key_places, self.frequencies, self.growth, key=True)


@dataclass(frozen=True)
class Piece:
    """A run of whole segments of one width in one pattern, seen by the heads of one offset.

    Every row is real and takes part: `offset`, `offset + dilation`, … of each segment.

    Attributes:
        pattern: index of the pattern.
        start: first token of the run.
        count: number of segments n.
        width: tokens per segment.
        offset: of the heads.
        dilation: step between rows.
        heads: the heads with this offset.
    """

    pattern: int
    start: int
    count: int
    width: int
    offset: int
    dilation: int
    heads: slice

    @property
    def rows(self) -> int:
        """Selected rows per segment, c."""
        return ceil_div(self.width - self.offset, self.dilation)

    def all_heads(self, x: Tensor) -> Tensor:
        """The selected rows of `[B, T, …]` with all heads, a view `[B, n, c, …]`."""
        run = x[:, self.start : self.start + self.count * self.width]
        return run.unflatten(1, (self.count, self.width))[:, :, self.offset :: self.dilation]

    def view(self, x: Tensor) -> Tensor:
        """The selected rows and heads of `[B, T, H, …]`, a view `[B, n, c, h, …]`."""
        return self.all_heads(x)[:, :, :, self.heads]

    def key_heads(self, heads: int, groups: int) -> list[int]:
        """For each of these query heads the key-value head it reads."""
        return [head // (heads // groups) for head in range(heads)[self.heads]]

    def key_view(self, x: Tensor, heads: int) -> Tensor:
        """As `view` for keys or values `[B, T, G, …]`, one entry per query head."""
        groups = x.shape[2]
        if groups == heads:
            return self.view(x)
        if groups == 1:
            return self.view(x.expand(-1, -1, heads, -1))
        index = torch.tensor(self.key_heads(heads, groups), device=x.device)
        return self.all_heads(x).index_select(3, index)


def sequences(cu_seqlens: Tensor | None, length: int) -> list[Span]:
    """Where the sequences of a row start and end; to a compiled graph, which knows no boundaries, a row is one."""
    if cu_seqlens is None or torch.compiler.is_compiling():
        return [(0, length)]
    return varlen.spans(cu_seqlens)


def ceil_div(number: int, divisor: int) -> int:
    """⌈number / divisor⌉."""
    return -(-number // divisor)


def head_groups(rule: str, heads: int, dilation: int) -> list[tuple[int, slice]]:
    """The offsets in use and the heads of each.

    Head j has offset j mod r (`mod`, the paper), ⌊j / ⌈H/r⌉⌋ (`block`, torchscale) or 0 (`none`).
    """
    if rule == "none":
        return [(0, slice(0, heads))]
    if rule == "mod":
        return [(offset, slice(offset, heads, dilation)) for offset in range(min(heads, dilation))]
    size = ceil_div(heads, dilation)
    return [(offset, slice(offset * size, (offset + 1) * size)) for offset in range(ceil_div(heads, size))]


def head_offsets(rule: str, heads: int, dilation: int) -> list[int]:
    """The offset of every head.

    Example:
        >>> head_offsets("mod", 4, 2), head_offsets("block", 4, 2), head_offsets("none", 4, 2)
        ([0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0])
    """
    offsets = [0] * heads
    for offset, group in head_groups(rule, heads, dilation):
        for head in range(heads)[group]:
            offsets[head] = offset
    return offsets


def pieces(settings: DilatedSettings, heads: int, spans: Sequence[Span]) -> Iterator[Piece]:
    """All that is to be computed for sequences at `spans`: per pattern the whole segments, the rest, each offset."""
    for index, (segment, dilation) in enumerate(settings.patterns):
        groups = head_groups(settings.head_offset, heads, dilation)
        for start, end in spans:
            segment_here = min(segment, end - start)
            if segment_here == 0:
                continue
            whole, rest = divmod(end - start, segment_here)
            for first, count, width in ((start, whole, segment_here), (end - rest, 1, rest)):
                for offset, group in groups:
                    if offset < width:
                        yield Piece(index, first, count, width, offset, dilation, group)


def fill(x: Tensor, segment: int, rows: int) -> Tensor:
    """Fills every segment of `[B, T, …]` with zeros to `rows` rows, `[B, ⌈T/segment⌉·rows, …]`."""
    count = ceil_div(x.shape[1], segment)
    whole = x.new_zeros((x.shape[0], count * segment, *x.shape[2:]))
    whole[:, : x.shape[1]] = x
    filled = x.new_zeros((x.shape[0], count, rows, *x.shape[2:]))
    filled[:, :, :segment] = whole.unflatten(1, (count, segment))
    return filled.flatten(1, 2)


def score_entries(settings: DilatedSettings, heads: int, length: int) -> int:
    """Number of scores of one sequence: Σ over pieces of n·c² per head, n·c(c + 1)/2 when causal."""
    total = 0
    for piece in pieces(settings, heads, [(0, length)]):
        pairs = piece.rows * (piece.rows + 1) // 2 if settings.causal else piece.rows**2
        total += piece.count * pairs * len(range(heads)[piece.heads])
    return total
