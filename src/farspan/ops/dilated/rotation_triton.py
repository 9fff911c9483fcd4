"""The launches of `turn_pair`: one kernel for both, and one for both gradients, which multiplies by the conjugates."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._launch import Constants, launch
from farspan.ops._library import register_node
from farspan.ops.dilated.rotation_kernels import turn_kernel

# Rows and heads of a program.
BLOCK, HEADS = 32, 4


def turn_pair_triton(q: Tensor, k: Tensor, factors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's form of `turn_pair`; arguments as there."""
    turned: tuple[Tensor, Tensor] = _Turn.apply(q.contiguous(), k.contiguous(), factors.contiguous(), rows.contiguous())
    return turned


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, factors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(factors, rows)
        queries, keys = turn_node(q, k, factors, rows, False)
        return queries, keys

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *turn_node(dq.contiguous(), dk.contiguous(), *ctx.saved_tensors, True), None, None


def _turned(q: Tensor, k: Tensor, factors: Tensor, rows: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    made = torch.empty_like(q), torch.empty_like(k)
    heads, groups, width = q.shape[2], k.shape[2], q.shape[3]
    grid = triton.cdiv(rows.numel(), BLOCK), triton.cdiv(heads, HEADS) + triton.cdiv(groups, HEADS)
    with torch.cuda.device_of(q):
        arguments = (q, k, *made, factors, rows, rows.numel(), factors.shape[1], heads, groups)
        launch(turn_kernel, grid, arguments, _constants(width, back), 4)
    return made


@functools.cache
def _constants(width: int, back: bool) -> Constants:
    return Constants(K=width, BACK=back, BT=BLOCK, HB=HEADS, BK=1 << (width - 1).bit_length())


turn_node = register_node(
    "turn_pair(Tensor q, Tensor k, Tensor factors, Tensor rows, bool back) -> (Tensor queries, Tensor keys)",
    _turned,
    lambda q, k, *others: (torch.empty_like(q), torch.empty_like(k)),
)
