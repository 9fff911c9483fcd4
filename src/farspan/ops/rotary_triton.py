"""Rotation of queries and keys on a GPU: one kernel, and one for both gradients, which turns back."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.rotary_kernels import rotate_kernel

# Rows and heads of a program, its warps and stages.
BLOCK, HEADS, SCHEDULE = 16, 4, (4, 3)


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
    tensors, options = (q, k, cos, sin, *made), (q.shape[-1], 2 * cos.shape[-1], interleaved)
    compile_ahead(("rotation", q.device, q.dtype, k.dtype, *options), lambda: _rehearse(tensors, *options))
    _launch(tensors, *options, back)
    return made


def _rehearse(tensors: tuple[Tensor, ...], *options: Any) -> None:
    """Both directions, for one token."""
    little = tuple(x.new_empty(1, 1, *x.shape[2:]) for x in tensors)
    for back in (False, True):
        _launch(little, *options, back)


def _launch(tensors: tuple[Tensor, ...], *options: Any) -> None:
    (batch, length, heads, _), groups = tensors[0].shape, tensors[1].shape[2]
    rows = batch * length
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(heads, HEADS) + triton.cdiv(groups, HEADS))
    launch(rotate_kernel, grid, (*tensors, rows, heads, groups), _constants(*options), *SCHEDULE)


@functools.cache
def _constants(width: int, rotary: int, interleaved: bool, back: bool) -> Constants:
    switches = {"INTERLEAVED": interleaved, "BACK": back}
    return Constants(K=width, R=rotary, **switches, BT=BLOCK, HB=HEADS, BK=triton.next_power_of_2(width))


rotate_node = register_node(
    "rotary_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool back) -> (Tensor, Tensor)",
    _rotate,
    lambda q, k, *others: (torch.empty_like(q), torch.empty_like(k)),
)
