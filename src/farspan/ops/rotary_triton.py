"""Rotation of queries and keys on a GPU: one kernel, and one for both gradients, which turns back."""

from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._library import register_node
from farspan.ops.rotary_kernels import rotate_kernel

# Rows and heads of a program.
BLOCK, HEADS = 16, 4


def rotary_pair_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The kernel's form of `rotary_pair`; arguments as there."""
    cos, sin = (x.detach().float().contiguous() for x in (cos, sin))
    turned: tuple[Tensor, Tensor] = _Rotation.apply(q.contiguous(), k.contiguous(), cos, sin, interleaved)
    return turned


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        turned, keys = rotate_node(q, k, cos, sin, interleaved, False)
        return turned, keys

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        gradients = rotate_node(dq.contiguous(), dk.contiguous(), *ctx.saved_tensors, ctx.interleaved, True)
        return *gradients, None, None, None


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> tuple[Tensor, Tensor]:
    made = torch.empty_like(q), torch.empty_like(k)
    rows, (heads, width), groups = q.shape[0] * q.shape[1], q.shape[2:], k.shape[2]
    sizes = {"K": width, "R": 2 * cos.shape[-1], "BT": BLOCK, "HB": HEADS, "BK": triton.next_power_of_2(width)}
    if rows:
        grid = (triton.cdiv(rows, BLOCK), triton.cdiv(heads, HEADS) + triton.cdiv(groups, HEADS))
        with torch.cuda.device_of(q):
            rotate_kernel[grid](
                q, k, cos, sin, *made, rows, heads, groups, INTERLEAVED=interleaved, BACK=back, **sizes, num_warps=4
            )
    return made


rotate_node = register_node(
    "rotary_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool back) -> (Tensor, Tensor)",
    _rotate,
    lambda q, k, *others: (torch.empty_like(q), torch.empty_like(k)),
)
