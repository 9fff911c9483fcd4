"""Which pieces of a dilated pattern one call of an attention kernel can take: rectangles of segments, heads and rows.

A box reads its rows in place. With one offset for all of its heads it is a regular step through the rows; with offsets
that rise by one from head to head, the step from head to head leads one token on as well. Where r divides neither the
segment nor the number of heads, segments hold ⌈w/r⌉ or ⌊w/r⌋ rows by offset, and such heads lie in different boxes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import Tensor

from farspan.ops.dilated.patterns import ceil_div, head_groups

Patterns = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Heads:
    """`count` heads, `step` apart, whose offsets begin at `offset` and rise by `rise` from one to the next."""

    first: int
    step: int
    count: int
    offset: int
    rise: int


@dataclass(frozen=True)
class Box:
    """`count` segments of `width` tokens from token `start`, `rows` rows of each, `dilation` apart, of some heads."""

    start: int
    count: int
    width: int
    dilation: int
    rows: int
    heads: Heads

    def of(self, x: Tensor) -> Tensor:
        """The rows of contiguous `[N, H, D]`, a view `[n, h, c, D]`."""
        step, heads = x.stride(0), self.heads
        first = (self.start + heads.offset) * step + heads.first * x.stride(1)
        sizes = (self.count, heads.count, self.rows, x.shape[2])
        strides = (self.width * step, heads.step * x.stride(1) + heads.rise * step, self.dilation * step, 1)
        return x.as_strided(sizes, strides, x.storage_offset() + first)

    def of_heads(self, x: Tensor) -> Tensor:
        """The rows of contiguous `[H, N]`, a view `[n, h, c]`."""
        step, heads = x.stride(0), self.heads
        sizes = (self.count, heads.count, self.rows)
        strides = (self.width, heads.step * step + heads.rise, self.dilation)
        return x.as_strided(sizes, strides, x.storage_offset() + heads.first * step + self.start + heads.offset)

    def slot(self, head: int) -> int | None:
        """The place of a head among those of the box; None if it is not one of them."""
        slot, between = divmod(head - self.heads.first, self.heads.step)
        return slot if between == 0 and 0 <= slot < self.heads.count else None

    def numbers(self, head: int) -> list[int]:
        """What the kernels read of a box for a head, in this order."""
        slot, heads = self.slot(head), self.heads
        if slot is None:
            return [0] * NUMBERS
        places = [self.start, self.count * self.width, self.rows, heads.count, slot, heads.offset + slot * heads.rise]
        return places + reciprocal(self.width) + reciprocal(self.dilation)


NUMBERS = 12
"""How many they are."""
WORD = 32
"""Boxes of which one word tells whether they have a head."""


def reciprocal(divisor: int) -> list[int]:
    """The divisor d, a factor m (as int32) and a shift s such that ⌊n/d⌋ = (2n·m >> 32) >> s for 0 ≤ n < 2³¹."""
    shift = (divisor - 1).bit_length()
    return [divisor, ceil_div(1 << (31 + shift), divisor) - (1 << 32), shift]


def table(some: Sequence[Box], base: Box | None, places: int, heads: int) -> list[int]:
    """All that the kernels read of these boxes, as if there were so many.

    For each `WORD` boxes and head which of them have it, a bit each; for each box and head its numbers; and last, the
    number of tokens of a segment of the base with its reciprocal.
    """
    found = []
    for first in range(0, places, WORD):
        word = some[first : first + WORD]
        for head in range(heads):
            bits = sum(1 << i for i, box in enumerate(word) if box.slot(head) is not None)
            found.append(bits - (bits >> (WORD - 1) << WORD))
    for box in some:
        found += [number for head in range(heads) for number in box.numbers(head)]
    found += [0] * ((places - len(some)) * heads * NUMBERS)
    return found + (reciprocal(base.width) if base else [])


def boxes(patterns: Patterns, rule: str, heads: int, start: int, stop: int) -> Iterator[Box]:
    """All boxes of the tokens from `start` to `stop`, at which segments of every pattern begin."""
    for segment, dilation in patterns:
        segment = min(segment, stop - start)
        whole, rest = divmod(stop - start, segment)
        for first, count, width in ((start, whole, segment), (stop - rest, 1, rest)):
            for some in head_runs(rule, heads, dilation, width):
                yield Box(first, count, width, dilation, ceil_div(width - some.offset, dilation), some)


def head_runs(rule: str, heads: int, dilation: int, width: int) -> list[Heads]:
    """The heads that have rows in a segment, in as few runs as possible of equally many rows per head."""
    groups = [(offset, range(heads)[some]) for offset, some in head_groups(rule, heads, dilation) if offset < width]
    alike = [Heads(some[0], some.step, len(some), offset, 0) for offset, some in groups]
    rising = []
    for index in range(max((len(some) for _, some in groups), default=0)):
        across = [(offset, some[index]) for offset, some in groups if index < len(some)]
        for _, equal in groupby(across, key=lambda entry: ceil_div(width - entry[0], dilation)):
            run = list(equal)
            step = next((b - a for (_, a), (_, b) in pairwise(run)), 1)
            rising.append(Heads(run[0][1], step, len(run), run[0][0], 1))
    return min(alike, rising, key=len)


def runs(patterns: Patterns, batch: int, length: int) -> list[tuple[int, int]]:
    """Stretches of the B·T tokens that can be treated as one sequence: all of them where segments end with the rows."""
    if batch == 1 or all(length % min(segment, length) == 0 for segment, _ in patterns):
        return [(0, batch * length)]
    return [(row * length, (row + 1) * length) for row in range(batch)]


def stretches(patterns: Patterns, start: int, stop: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Cuts a run into parts of about so many tokens, at the common ends of all segments."""
    together = math.lcm(*(segment for segment, _ in patterns))
    step = together * max(1, tokens // together)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
