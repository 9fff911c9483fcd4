"""Collinear attention on a GPU: one kernel makes query and key, softmax attention does the rest."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.collinear import kernels
from farspan.ops.softmax.api import softmax_attention

# Rows and heads of a program, its warps and stages.
BLOCK, HEADS, SCHEDULE = 16, 4, (4, 3)


def collinear_attention_triton(
    q: Tensor, t: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, form: str, tie: str, scale: float, **visibility: Any
) -> Tensor:
    """See `collinear_attention`."""
    cos, sin = (x.detach().float().contiguous() for x in (cos, sin))
    query, key = _Transform.apply(q.contiguous(), t.contiguous(), cos, sin, form == "strict", tie == "head", scale)
    return softmax_attention(query, key, v, scale=1.0, **visibility)


def collinear_coefficients_triton(raw: Tensor, rotary_dim: int, tie: str) -> Tensor:
    """See `collinear_coefficients`."""
    t: Tensor = _Coefficients.apply(raw.contiguous(), rotary_dim, tie == "head")
    return t


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, t: Tensor, cos: Tensor, sin: Tensor, strict: bool, head: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, t, cos, sin)
        ctx.options = strict, head, scale
        query, key = transform_node(q, t, cos, sin, strict, head, scale)
        return query, key

    @staticmethod
    @plain_backward
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
        gradients = transform_gradient_node(d_query.contiguous(), d_key.contiguous(), *ctx.saved_tensors, *ctx.options)
        return (*gradients, None, None, None, None, None)


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, rotary_dim: int, head: bool) -> Tensor:
        t: Tensor = coefficients_node(raw, rotary_dim, head)
        ctx.save_for_backward(t)
        ctx.options = rotary_dim, head
        return t

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor | None, ...]:
        return coefficients_gradient_node(dt.contiguous(), *ctx.saved_tensors, *ctx.options), None, None


def _launch(
    kernel: Any, inputs: tuple[Tensor, ...], q: Tensor, t: Tensor, outputs: tuple[Tensor, Tensor], *options: Any
) -> None:
    (batch, queries, heads, width), (keys, groups) = q.shape, t.shape[1:3]
    strict, head, scale, rotary_dim = options
    if q.numel() == 0 and t.numel() == 0:
        return
    grid = (triton.cdiv(batch * keys, BLOCK), triton.cdiv(heads, HEADS) + triton.cdiv(groups, HEADS))
    arguments: tuple[Any, ...] = (*inputs, *outputs, float(scale), batch, queries, keys, heads, groups)
    constants = _constants(width, rotary_dim, ("STRICT", strict), ("HEAD", head), ("BT", BLOCK), ("HB", HEADS))
    launch(kernel, grid, arguments, constants, *SCHEDULE)


@functools.cache
def _constants(width: int, rotary_dim: int, *others: tuple[str, int]) -> Constants:
    return Constants(K=width, R=rotary_dim, **dict(others), BK=triton.next_power_of_2(width))


def _transform(
    q: Tensor, t: Tensor, cos: Tensor, sin: Tensor, strict: bool, head: bool, scale: float
) -> tuple[Tensor, Tensor]:
    made, options = _room(q, t), (strict, head, scale, 2 * cos.shape[-1])
    key = q.device, q.dtype, t.dtype, q.shape[-1], 2 * cos.shape[-1], strict, head
    compile_ahead(("collinear", *key), lambda: _rehearse(q, t, cos, *options))
    _launch(kernels.transform_kernel, (q, t, cos, sin), q, t, made, *options)
    return made


def _rehearse(q: Tensor, t: Tensor, cos: Tensor, *options: Any) -> None:
    """The forward launch and that of the gradients, for one token."""
    q, t, cos = (x.new_empty(1, 1, *x.shape[2:]) for x in (q, t, cos))
    made = _room(q, t)
    _launch(kernels.transform_kernel, (q, t, cos, cos), q, t, made, *options)
    _launch(kernels.transform_gradient_kernel, (*made, q, cos, cos), q, t, (q, t), *options)


def _transform_gradient(
    d_query: Tensor, d_key: Tensor, q: Tensor, t: Tensor, cos: Tensor, sin: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    made = torch.empty_like(q), torch.empty_like(t)
    inputs = (d_query, d_key, q, cos, sin)
    _launch(kernels.transform_gradient_kernel, inputs, q, t, made, *options, 2 * cos.shape[-1])
    return made


def _coefficients(raw: Tensor, rotary_dim: int, head: bool) -> Tensor:
    t = raw.new_empty(*raw.shape[:-1], raw.shape[-1] // 2)
    key = raw.device, raw.dtype, raw.shape[-1], rotary_dim, head
    compile_ahead(("collinear coefficients", *key), lambda: _rehearse_rows(raw, rotary_dim, head))
    _launch_rows(kernels.coefficient_kernel, (raw, t), raw, rotary_dim, head)
    return t


def _rehearse_rows(raw: Tensor, *options: Any) -> None:
    """Both launches of coefficients, for one row."""
    raw = raw.new_empty(1, raw.shape[-1])
    _launch_rows(kernels.coefficient_kernel, (raw, raw), raw, *options)
    _launch_rows(kernels.coefficient_gradient_kernel, (raw, raw, raw), raw, *options)


def _coefficients_gradient(dt: Tensor, t: Tensor, rotary_dim: int, head: bool) -> Tensor:
    d_raw = dt.new_empty(*t.shape[:-1], 2 * t.shape[-1])
    _launch_rows(kernels.coefficient_gradient_kernel, (dt, t, d_raw), d_raw, rotary_dim, head)
    return d_raw


def _launch_rows(kernel: Any, tensors: tuple[Tensor, ...], wide: Tensor, rotary_dim: int, head: bool) -> None:
    width = wide.shape[-1]
    rows = wide.numel() // width
    constants = _constants(width, rotary_dim, ("HEAD", head), ("BT", BLOCK))
    launch(kernel, (triton.cdiv(rows, BLOCK),), (*tensors, rows), constants, *SCHEDULE)


def _room(q: Tensor, t: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), t.new_empty(*t.shape[:3], 2 * t.shape[3])


transform_node = register_node(
    "collinear_transform(Tensor q, Tensor t, Tensor cos, Tensor sin, bool strict, bool head, float scale) "
    "-> (Tensor query, Tensor key)",
    _transform,
    _room,
)
transform_gradient_node = register_node(
    "collinear_transform_gradient(Tensor d_query, Tensor d_key, Tensor q, Tensor t, Tensor cos, Tensor sin, "
    "bool strict, bool head, float scale) -> (Tensor dq, Tensor dt)",
    _transform_gradient,
    lambda d_query, d_key, q, t, *others: (torch.empty_like(q), torch.empty_like(t)),
)
coefficients_node = register_node(
    "collinear_coefficients(Tensor raw, int rotary_dim, bool head) -> Tensor t",
    _coefficients,
    lambda raw, *others: raw.new_empty(*raw.shape[:-1], raw.shape[-1] // 2),
)
coefficients_gradient_node = register_node(
    "collinear_coefficients_gradient(Tensor dt, Tensor t, int rotary_dim, bool head) -> Tensor d_raw",
    _coefficients_gradient,
    lambda dt, *others: dt.new_empty(*dt.shape[:-1], 2 * dt.shape[-1]),
)
