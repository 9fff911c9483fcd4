"""Packed documents: several sequences laid end to end in one row of batch 1, described by their boundaries.

`cu_seqlens` is int32 `[num_seqs + 1]`: it starts at 0, never falls, and ends at the number of tokens N; sequence i
occupies `cu_seqlens[i]:cu_seqlens[i + 1]`. Sequences of length zero are legal.
"""

import itertools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from farspan.errors import ShapeError

_remembered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_cu_seqlens(cu_seqlens: Tensor, length: int, *, name: str = "cu_seqlens") -> None:
    """Checks the boundaries of packed documents; under torch.compile without their values, which are not known there.

    Args:
        cu_seqlens: `[num_seqs + 1]` int32.
        length: N, the number of packed tokens.
        name: how the message calls the tensor.

    Raises:
        ShapeError: wrong dtype or rank, or the values do not rise from 0 to N.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ShapeError(f"{name} is a {type(cu_seqlens).__name__}; expected an int32 tensor [num_seqs + 1].")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ShapeError(
            f"{name} is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}; expected int32 [num_seqs + 1]."
        )
    if torch.compiler.is_compiling():
        return
    bounds = boundaries(cu_seqlens)
    if bounds[0] != 0 or bounds[-1] != length:
        raise ShapeError(f"{name} runs from {bounds[0]} to {bounds[-1]}; it must start at 0 and end at N={length}.")
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ShapeError(f"{name} falls from {start} to {end} at entry {index + 1}; it must never fall.")


def boundaries(cu_seqlens: Tensor) -> list[int]:
    """The boundaries as Python integers, read from the device once per tensor."""
    return remember(cu_seqlens, "boundaries", lambda: [int(value) for value in cu_seqlens.tolist()])


def spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Start and end of every sequence as Python integers."""
    return list(itertools.pairwise(boundaries(cu_seqlens)))


def from_lengths(lengths: Tensor) -> Tensor:
    """Boundaries of sequences of the given lengths.

    Args:
        lengths: `[num_seqs]` integer, each >= 0.

    Returns:
        `[num_seqs + 1]` int32.

    Example:
        >>> from_lengths(torch.tensor([2, 0, 3])).tolist()
        [0, 2, 2, 5]
    """
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def from_position_ids(position_ids: Tensor) -> Tensor:
    """Boundaries of documents whose positions restart: a document begins wherever the position does not rise.

    Positions may skip numbers inside a document, as in training for longer contexts than a sequence holds.

    Args:
        position_ids: `[N]` or `[1, N]` integer.

    Returns:
        `[num_seqs + 1]` int32; `[0]` alone when N = 0.

    Raises:
        ShapeError: more than one row.

    Example:
        >>> from_position_ids(torch.tensor([0, 1, 2, 0, 1, 0])).tolist()
        [0, 3, 5, 6]
    """
    flat = position_ids.reshape(-1)
    if flat.numel() != position_ids.shape[-1]:
        raise ShapeError(f"position_ids has shape {list(position_ids.shape)}; packed documents need [N] or [1, N].")
    if flat.numel() == 0:
        return torch.zeros(1, dtype=torch.int32, device=flat.device)
    inside = torch.nonzero(flat[1:] <= flat[:-1]).squeeze(-1) + 1
    ends = flat.new_tensor([flat.numel()])
    return torch.cat([flat.new_zeros(1), inside, ends]).to(torch.int32)


def position_ids(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """Positions of all packed tokens, restarting at 0 in each sequence.

    Args:
        cu_seqlens: `[num_seqs + 1]` int32.
        length: N; with it no value is read.

    Returns:
        `[N]` int64.

    Example:
        >>> position_ids(torch.tensor([0, 3, 3, 5], dtype=torch.int32)).tolist()
        [0, 1, 2, 0, 1]
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    total = boundaries(cu_seqlens)[-1] if length is None else length
    return torch.arange(total, device=cu_seqlens.device) - starts.repeat_interleave(lengths, output_size=total)


def sequence_ids(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """For every packed token the index of its sequence, `[N]` int64; with N given, no value is read."""
    length = boundaries(cu_seqlens)[-1] if length is None else length
    places = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], places, right=True)


def chunk_indices(cu_seqlens: Tensor, chunk: int) -> Tensor:
    """All chunks of all sequences, in order, for a grid with one program per chunk.

    Args:
        cu_seqlens: `[num_seqs + 1]` int32.
        chunk: C, the chunk length.

    Returns:
        `[num_chunks, 2]` int32: the sequence, and the chunk inside the sequence.

    Example:
        >>> chunk_indices(torch.tensor([0, 3, 3, 5], dtype=torch.int32), 2).tolist()
        [[0, 0], [0, 1], [2, 0]]
    """

    def build() -> Tensor:
        pairs = [
            (sequence, index)
            for sequence, (start, end) in enumerate(spans(cu_seqlens))
            for index in range(-(-(end - start) // chunk))
        ]
        return torch.tensor(pairs, dtype=torch.int32, device=cu_seqlens.device).reshape(-1, 2)

    return remember(cu_seqlens, ("chunk_indices", chunk), build)


def aligned_positions(cu_seqlens: Tensor, chunk: int, *, before: int = 0) -> Tensor:
    """Where each packed token stands when every sequence is padded to whole chunks, after `before` rows of its own.

    Args:
        cu_seqlens: `[num_seqs + 1]` int32.
        chunk: C; each sequence, with the rows before it, takes a multiple of C rows.
        before: rows to leave free in front of each sequence.

    Returns:
        `[N]` int64, indices into the padded row of length `aligned_length(cu_seqlens, chunk, before=before)`.
    """

    def build() -> Tensor:
        rows = cu_seqlens.diff().long() + before
        whole = (rows + chunk - 1) // chunk * chunk
        shift = whole.cumsum(0) - whole + before
        return position_ids(cu_seqlens) + shift[sequence_ids(cu_seqlens)]

    return remember(cu_seqlens, ("aligned", chunk, before), build)


def aligned_length(cu_seqlens: Tensor, chunk: int, *, before: int = 0) -> int:
    """Rows that all sequences take together when each is padded to whole chunks."""
    return sum(-(-(end - start + before) // chunk) * chunk for start, end in spans(cu_seqlens))


def pack(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Removes the right padding of a batch.

    Args:
        x: `[B, T, ...]`, row b valid in its first `lengths[b]` positions.
        lengths: `[B]` integer.

    Returns:
        `[1, N, ...]` and the boundaries `[B + 1]` int32.
    """
    keep = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x[keep].unsqueeze(0), from_lengths(lengths)


def unpack(x: Tensor, cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """Lays packed sequences out as a batch with zeros on the right, the inverse of `pack`.

    Args:
        x: `[1, N, ...]`.
        cu_seqlens: `[num_seqs + 1]` int32.
        length: T of the result; None takes the longest sequence.

    Returns:
        `[num_seqs, T, ...]`.
    """
    longest = max((end - start for start, end in spans(cu_seqlens)), default=0)
    rows, columns = sequence_ids(cu_seqlens), position_ids(cu_seqlens)
    padded = x.new_zeros(cu_seqlens.numel() - 1, longest if length is None else length, *x.shape[2:])
    return padded.index_put((rows, columns), x[0])


def reverse(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Turns every sequence round in its own place; twice gives the input back.

    Args:
        x: `[B, T, ...]`, or packed `[1, N, ...]`.
        cu_seqlens: `[num_seqs + 1]` int32; None means that every row is one sequence.

    Returns:
        A tensor like x.

    Example:
        >>> reverse(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([0, 3, 3, 5], dtype=torch.int32)).tolist()
        [[3, 2, 1, 5, 4]]
    """
    if cu_seqlens is None:
        return x.flip(1)

    def build() -> Tensor:
        first_and_last = (cu_seqlens[:-1] + cu_seqlens[1:]).long() - 1
        places = torch.arange(x.shape[1], device=cu_seqlens.device)
        return first_and_last[sequence_ids(cu_seqlens, x.shape[1])] - places

    return x.index_select(1, remember(cu_seqlens, "reversed", build))


def remember(cu_seqlens: Tensor, what: Hashable, build: Callable[[], Any]) -> Any:
    """Keeps what `build` derives from a boundaries tensor as long as the tensor lives and is not written to.

    All layers of a model see the same tensor, so the device is read, and each index built, once per batch.
    """
    if torch.compiler.is_compiling():  # the compiler sees one graph, in which equal subgraphs are one
        return build()
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    known = _remembered.setdefault(cu_seqlens, {})
    if (what, version) not in known:
        known[what, version] = build()
    return known[what, version]
