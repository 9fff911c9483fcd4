"""Norm and rotation of queries and keys on a GPU: one kernel forward, one for all gradients."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.rotary_norm_kernels import normed_gradient_kernel, normed_kernel

# Rows and heads of a program, its warps and stages.
BLOCK, HEADS, SCHEDULE = 16, 4, (4, 3)


def normed_rotary_pair_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor], norm_eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The kernels' form of `rotary_pair` with norms; arguments as there."""
    tensors = (q.contiguous(), k.contiguous(), *(x.detach().float().contiguous() for x in (cos, sin)))
    weights = (w.contiguous() for w in norms)
    turned: tuple[Tensor, Tensor] = _NormedRotation.apply(*tensors, *weights, norm_eps, interleaved)
    return turned


class _NormedRotation(torch.autograd.Function):
    """Queries and keys, normed and rotated; tables are constants."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:6])
        ctx.options = arguments[6:]
        turned, keys = normed_node(*arguments)
        return turned, keys

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        tensors = (*ctx.saved_tensors, dq.contiguous(), dk.contiguous())
        dq, dk, dq_norm, dk_norm = normed_gradient_node(*tensors, *ctx.options)
        return dq, dk, None, None, dq_norm, dk_norm, None, None


def _launch(kernel: Any, tensors: tuple[Tensor, ...], eps: float, interleaved: bool) -> None:
    (batch, length, heads, width), groups = tensors[0].shape, tensors[1].shape[2]
    rows = batch * length
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(heads, HEADS) + triton.cdiv(groups, HEADS))
    arguments: tuple[Any, ...] = (*tensors, float(eps), rows, heads, groups)
    launch(kernel, grid, arguments, _constants(width, interleaved), *SCHEDULE)


@functools.cache
def _constants(width: int, interleaved: bool) -> Constants:
    return Constants(K=width, INTERLEAVED=interleaved, BT=BLOCK, HB=HEADS, BK=triton.next_power_of_2(width))


def _rehearse(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor], eps: float, interleaved: bool
) -> None:
    """The forward launch and that of the gradients, for one token."""
    given = (*(x.new_empty(1, 1, *x.shape[2:]) for x in (q, k, cos, sin)), *norms)
    made = given[:2]
    _launch(normed_kernel, (*given, *made), eps, interleaved)
    _launch(normed_gradient_kernel, (*given, *made, *made, *_parts(*made)), eps, interleaved)


def _parts(q: Tensor, k: Tensor) -> list[Tensor]:
    """What blocks of rows and of heads give to the gradients of the weights."""
    blocks = triton.cdiv(q.shape[0] * q.shape[1], BLOCK)
    return [q.new_empty(blocks, triton.cdiv(x.shape[2], HEADS), x.shape[3], dtype=torch.float32) for x in (q, k)]


def _normed(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    made = torch.empty_like(q), torch.empty_like(k)
    key = q.device, q.shape[-1], interleaved, *(x.dtype for x in (q, k, q_norm, k_norm))
    rehearse = functools.partial(_rehearse, q, k, cos, sin, (q_norm, k_norm), eps, interleaved)
    compile_ahead(("norm and rotation", *key), rehearse)
    _launch(normed_kernel, (q, k, cos, sin, q_norm, k_norm, *made), eps, interleaved)
    return made


def _normed_gradient(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    dq: Tensor,
    dk: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made, parts = (torch.empty_like(q), torch.empty_like(k)), _parts(q, k)
    tensors = (q, k, cos, sin, q_norm, k_norm, dq, dk, *made, *parts)
    _launch(normed_gradient_kernel, tensors, eps, interleaved)
    dq_norm, dk_norm = (part.sum((0, 1)).to(w.dtype) for part, w in zip(parts, (q_norm, k_norm), strict=True))
    return *made, dq_norm, dk_norm


_INPUTS = "Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor q_norm, Tensor k_norm"
normed_node = register_node(
    f"normed_rotary_pair({_INPUTS}, float eps, bool interleaved) -> (Tensor, Tensor)",
    _normed,
    lambda q, k, *others: (torch.empty_like(q), torch.empty_like(k)),
)
normed_gradient_node = register_node(
    f"normed_rotary_pair_gradient({_INPUTS}, Tensor dq, Tensor dk, float eps, bool interleaved) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _normed_gradient,
    lambda q, k, cos, sin, q_norm, k_norm, *others: tuple(torch.empty_like(x) for x in (q, k, q_norm, k_norm)),
)
