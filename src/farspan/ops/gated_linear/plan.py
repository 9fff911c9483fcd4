"""Where segments and chunks lie among the tokens: the tables that the kernels of the state-based operators walk."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.ops import varlen

# Programs of the state kernels that keep the card busy: one for each of 132 multiprocessors.
PROGRAMS = 132
# Fewest and most chunks of a segment.
SEGMENT = (4, 128)


class Plan(NamedTuple):
    """Tables of int32 on the device.

    Attributes:
        segments: `[num_segments, 4]`: first token, end of its tokens, first chunk, and which sequence it begins or −1.
        offsets: `[num_seqs + 1]`: the first segment of every sequence.
        chunks: `[num_chunks, 2]`: first token, end of its sequence.
    """

    segments: Tensor
    offsets: Tensor
    chunks: Tensor

    @property
    def whole(self) -> bool:
        """Whether every sequence is one segment."""
        return self.segments.shape[0] == self.offsets.shape[0] - 1

    def part(self, parts: int) -> "Plan":
        """The tables of the first of so many equal parts of a batch, which are those of every other part."""
        segments, sequences, chunks = len(self.segments), len(self.offsets) - 1, len(self.chunks)
        return Plan(
            self.segments[: segments // parts], self.offsets[: sequences // parts + 1], self.chunks[: chunks // parts]
        )


def plan_chunks(like: Tensor, cu_seqlens: Tensor | None, chunk: int, streams: int) -> Plan:
    """Cuts the sequences of a call into chunks, and into segments that keep the card busy.

    Args:
        like: a tensor `[B, T, …]` on the device.
        cu_seqlens: `[num_seqs + 1]` int32, or None.
        chunk: C.
        streams: programs that work on the same tokens: heads, times blocks of V.
    """
    batch, length = like.shape[:2]
    work = batch * length * streams // (chunk * PROGRAMS)
    segment = chunk * min(max(1 << work.bit_length() >> 1, SEGMENT[0]), SEGMENT[1])
    if cu_seqlens is None:
        return _dense(batch, length, segment, chunk, like.device)

    def build() -> Plan:
        varlen.check_cu_seqlens(cu_seqlens, length)
        return cut(varlen.spans(cu_seqlens), segment, chunk, like.device)

    plan: Plan = varlen.remember(cu_seqlens, ("plan", segment, chunk), build)
    return plan


def most_chunks(length: int, batch: int, cu_seqlens: Tensor | None, chunk: int) -> int:
    """How many chunks there are at most, told without reading the boundaries."""
    whole = -(-length // chunk)
    return batch * whole if cu_seqlens is None else whole + cu_seqlens.shape[0] - 1


def most_segments(length: int, batch: int, cu_seqlens: Tensor | None, chunk: int) -> int:
    """How many segments there are at most, told likewise."""
    return most_chunks(length, batch, cu_seqlens, SEGMENT[0] * chunk)


@functools.lru_cache(maxsize=64)
def _dense(batch: int, length: int, segment: int, chunk: int, device: torch.device) -> Plan:
    return cut([(row * length, (row + 1) * length) for row in range(batch)], segment, chunk, device)


def cut(spans: list[tuple[int, int]], segment: int, chunk: int, device: torch.device) -> Plan:
    """The tables of sequences with the given first tokens and ends."""
    segments: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    offsets = [0]
    for sequence, (start, end) in enumerate(spans):
        for first in range(start, max(end, start + 1), segment):
            last = min(first + segment, end)
            segments.append((first, last, len(chunks), sequence if first == start else -1))
            chunks += [(token, end) for token in range(first, last, chunk)]
        offsets.append(len(segments))
    tables = (torch.tensor(table, dtype=torch.int32) for table in (segments, offsets, chunks))
    return Plan(*(table.to(device, non_blocking=True) for table in tables))
