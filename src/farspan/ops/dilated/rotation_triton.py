"""Rotation by positions on a GPU, once for all patterns.

Scores depend on the distance of query and key alone, so any centre will do that they share. Where every segment lies in
one of the longest, the middle of that serves all patterns, and bounds exponents as the longest segments do anyway.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._launch import Constants, launch
from farspan.ops._library import register_node
from farspan.ops.dilated.rotation import rotation_table
from farspan.ops.dilated.rotation_kernels import turn_kernel

# Rows and heads of a program.
BLOCK, HEADS = 32, 4


def turned(
    q: Tensor, k: Tensor, frequencies: Tensor, growth: Tensor, bounds: list[int], window: int
) -> tuple[Tensor, Tensor]:
    """Contiguous queries and keys, turned by their places from the middle of their window.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, G, K]`.
        frequencies, growth: `[K/2]`, as for `dilated_attention`.
        bounds: where the sequences start and end in turn, of the B·T tokens.
        window: tokens from one centre to the next in a sequence.

    Returns:
        Both in their dtypes; formed in float32 and rounded once.
    """
    both: tuple[Tensor, Tensor] = _Turn.apply(q, k, frequencies, growth, bounds, window)
    return both


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, frequencies: Tensor, growth: Tensor, bounds: list[int], window: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(frequencies, growth)
        ctx.places = bounds, window
        queries, keys = turn_node(q, k, frequencies, growth, bounds, window, False)
        return queries, keys

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        both = turn_node(dq.contiguous(), dk.contiguous(), *ctx.saved_tensors, *ctx.places, True)
        return *both, None, None, None, None


def _turned(
    q: Tensor, k: Tensor, frequencies: Tensor, growth: Tensor, bounds: list[int], window: int, back: bool
) -> tuple[Tensor, Tensor]:
    made, rows = (torch.empty_like(q), torch.empty_like(k)), q.shape[0] * q.shape[1]
    heads, groups, width = q.shape[2], k.shape[2], q.shape[3]
    centred = torch.arange(window, device=q.device) - (window - 1) / 2
    sides = [rotation_table(centred, frequencies, growth, key=key) for key in (False, True)]
    factors = torch.stack([part for side in sides for part in (side.real, side.imag)]).float()
    places = _places(tuple(bounds), window, q.device)
    grid = triton.cdiv(rows, BLOCK), triton.cdiv(heads, HEADS) + triton.cdiv(groups, HEADS)
    with torch.cuda.device_of(q):
        arguments = (q, k, *made, factors, places, rows, window, heads, groups)
        launch(turn_kernel, grid, arguments, _constants(width, back), 4)
    return made


@functools.lru_cache(maxsize=8)
def _places(bounds: tuple[int, ...], window: int, device: torch.device) -> Tensor:
    """Places of all tokens in their windows, `[N]` int32."""
    starts, ends = torch.tensor(bounds).view(-1, 2).to(device).unbind(1)
    index = torch.arange(bounds[-1], device=device)
    return ((index - starts.repeat_interleave(ends - starts, output_size=bounds[-1])) % window).int()


@functools.cache
def _constants(width: int, back: bool) -> Constants:
    return Constants(K=width, BACK=back, BT=BLOCK, HB=HEADS, BK=1 << (width - 1).bit_length())


turn_node = register_node(
    "dilated_turn(Tensor q, Tensor k, Tensor frequencies, Tensor growth, int[] bounds, int window, bool back) -> "
    "(Tensor queries, Tensor keys)",
    _turned,
    lambda q, k, *others: (torch.empty_like(q), torch.empty_like(k)),
)
