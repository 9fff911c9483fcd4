"""Cosine attention through one kernel: the outputs and each gradient are a walk along the sequence.

With unit vectors q and k, weights f and w of queries and keys, and do the gradient of the outputs,

    o_t  = f_t sum_{s<=t} (q_t . k_s) w_s v_s         dq_t = f_t sum_{s<=t} (do_t . v_s) w_s k_s
    dk_s = w_s sum_{t>=s} (v_s . do_t) f_t q_t        dv_s = w_s sum_{t>=s} (k_s . q_t) f_t do_t

so nothing but the inverse norms, and the states in front of the segments, is kept beside the inputs.
"""

from typing import Any

import torch
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._launch import compile_ahead
from farspan.ops._library import register_node
from farspan.ops.cosine.reference import Call
from farspan.ops.cosine.torch import attend
from farspan.ops.gated_linear import rows
from farspan.ops.gated_linear.plan import Plan, cut, most_segments, plan_chunks
from farspan.ops.gated_linear.rows import Walk
from farspan.ops.gated_linear.tiles import chunk_of, widest_of
from farspan.ops.gated_linear.triton import gated_linear_attention_triton


def cosine_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """The kernels' form of `cosine_attention`; arguments and results as the reference's.

    Bidirectional calls are two matrix products and need no kernel.
    """
    if not call.causal or max(q.shape[-1], v.shape[-1]) > widest_of(q):
        return attend(gated_linear_attention_triton, q, k, v, initial_state, call)
    if call.padding_mask is not None:  # a vector of zeros has no direction
        padding = (call.padding_mask == 0)[..., None, None]
        q, k = q.masked_fill(padding, 0.0), k.masked_fill(padding, 0.0)
    tensors = (None if x is None else x.contiguous() for x in (q, k, v, call.log_count, call.exponent, initial_state))
    out, final = _Attention.apply(*tensors, call.cu_seqlens, call.by_query, float(call.eps))
    return out, final


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, final, *rest = cosine_node(*arguments)
        if not torch.compiler.is_compiling():  # where a missing gradient costs nothing anyway
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:7], *rest)
        ctx.form = arguments[7:]
        return out, final

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dq, dk, dv, d_exponent, d_initial = cosine_gradient_node(*gradients, *saved, *ctx.form)
        exponent, initial = saved[4:6]
        d_initial = None if initial is None else d_initial.to(initial.dtype)
        return (
            dq,
            dk,
            dv,
            None,
            None if exponent is None else d_exponent.to(exponent.dtype),
            d_initial,
            None,
            None,
            None,
        )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor | None,
    exponent: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    by_query: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    results = _results(q, k, v, log_count, exponent, initial, cu_seqlens, by_query, eps)
    if v.numel() == 0:
        results[1].zero_() if initial is None else results[1].copy_(initial)
        return results
    with torch.cuda.device_of(q):
        kinds = (x is not None and x.dtype for x in (q, k, v, log_count, exponent, initial))
        key = ("cosine", q.device, q.shape[3], v.shape[3], by_query, *kinds)
        compile_ahead(key, lambda: _rehearse(q, k, v, log_count, exponent, initial, by_query, eps))
        _run(_plan(q, v, cu_seqlens), q, k, v, log_count, exponent, initial, by_query, eps, results)
    return results


def _run(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor | None,
    exponent: Tensor | None,
    initial: Tensor | None,
    by_query: bool,
    eps: float,
    results: tuple[Tensor, ...],
) -> None:
    out, final, q_scale, k_scale, entering = results
    factor = _factor(exponent, by_query)
    walk = Walk(q, k, v, factor=factor, log_count=log_count, exponent=exponent, eps=eps, unit=True)
    start = walk.between(plan, initial, final, entering=entering)
    walk.run(plan, out, start, final, scales=(q_scale, k_scale))


def _results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor | None,
    exponent: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    by_query: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(sequences, *q.shape[2:], v.shape[-1], dtype=torch.float32)
    q_scale, k_scale = (state.new_empty(q.shape[:3]) for _ in range(2))
    segments = most_segments(q.shape[1], q.shape[0], cu_seqlens, chunk_of(q))
    return torch.empty_like(v), state, q_scale, k_scale, state.new_empty(segments, *state.shape[1:])


def _backward(
    d_out: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor | None,
    exponent: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    q_scale: Tensor,
    k_scale: Tensor,
    entering: Tensor,
    by_query: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    saved = q, k, v, log_count, exponent, initial
    results = _gradients(d_out, d_final, *saved, cu_seqlens, q_scale, k_scale, entering, by_query, eps)
    if v.numel() == 0:
        for gradient in results:
            gradient.zero_()
        if d_final is not None:
            results[-1].copy_(d_final)
        return results
    d_out = torch.zeros_like(v) if d_out is None else d_out.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    with torch.cuda.device_of(q):
        _run_backward(
            _plan(q, v, cu_seqlens), d_out, d_final, *saved, q_scale, k_scale, entering, by_query, eps, results
        )
    return results


def _run_backward(
    plan: Plan,
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor | None,
    exponent: Tensor | None,
    initial: Tensor | None,
    q_scale: Tensor,
    k_scale: Tensor,
    entering: Tensor,
    by_query: bool,
    eps: float,
    results: tuple[Tensor, ...],
) -> None:
    dq, dk, dv, d_exponent, d_initial = results
    # Where the factor stands in the walks of o and dq, whose results are at queries, and of dk and dv, at keys.
    factor = _factor(exponent, by_query)
    mirrored = 3 - factor if factor else 0
    shared: dict[str, Any] = {"log_count": log_count, "exponent": exponent, "eps": eps}
    parts = torch.empty((plan.segments.shape[0], q.shape[2]), dtype=torch.float32, device=q.device)
    start = initial if plan.whole else entering
    walk = Walk(d_out, v, k, b=k_scale, factor=factor, own=q, own_scale=q_scale, **shared)
    walk.run(plan, dq, start, turned=True, parts=parts)
    walk = Walk(k, q, d_out, a=k_scale, b=q_scale, factor=mirrored, **shared)
    end = walk.between(plan, d_final, d_initial, reverse=True)
    walk.run(plan, dv, end, d_initial, reverse=True)
    walk = Walk(v, d_out, q, b=q_scale, factor=mirrored, own=k, own_scale=k_scale, **shared)
    walk.run(plan, dk, end, turned=True, reverse=True, parts=parts)
    if exponent is not None:
        torch.sum(parts, 0, out=d_exponent)


def _gradients(
    d_out: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor | None,
    exponent: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    q_scale: Tensor,
    k_scale: Tensor,
    entering: Tensor,
    by_query: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    _, d_initial, *_ = _results(q, k, v, log_count, exponent, initial, cu_seqlens, by_query, eps)
    d_exponent = q.new_empty(0 if exponent is None else q.shape[2], dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_exponent, d_initial


def _rehearse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_count: Tensor | None,
    exponent: Tensor | None,
    initial: Tensor | None,
    by_query: bool,
    eps: float,
) -> None:
    """Makes all launches on sequences of two chunks, cut into two segments and whole."""
    chunk = chunk_of(q)
    length = 2 * chunk

    def short(x: Tensor) -> Tensor:
        return x.new_empty(1, length, *x.shape[2:])

    q, k, v = short(q), short(k), short(v)
    log_count = None if log_count is None else short(log_count)
    start = None if initial is None else initial.new_empty(1, *initial.shape[1:])
    saved: tuple[Any, ...] = (q, k, v, log_count, exponent, start)
    for segment in (length, chunk):
        plan = cut([(0, length)], segment, chunk, q.device)
        forward: tuple[Any, ...] = (*saved, None, by_query, eps)
        results = _results(*forward)
        forward = (plan, *saved, by_query, eps, results)
        _run(*forward)
        backward: tuple[Any, ...] = (v, None, *saved, None, *results[2:], by_query, eps)
        gradients = _gradients(*backward)
        backward = (plan, v, None, *saved, *results[2:], by_query, eps, gradients)
        _run_backward(*backward)


def _factor(exponent: Tensor | None, by_query: bool) -> int:
    return 0 if exponent is None else 1 if by_query else 2


def _plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Plan:
    return plan_chunks(q, cu_seqlens, chunk_of(q), q.shape[2] * -(-v.shape[3] // rows.NARROWEST))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_count, Tensor? exponent, Tensor? initial, Tensor? cu_seqlens"
_SAVED = "Tensor q_scale, Tensor k_scale, Tensor entering"
_FORM = "bool by_query, float eps"
cosine_node = register_node(
    f"cosine_kernels({_INPUTS}, {_FORM}) -> (Tensor out, Tensor final, {_SAVED})",
    _forward,
    _results,
)
cosine_gradient_node = register_node(
    f"cosine_kernels_gradient(Tensor? d_out, Tensor? d_final, {_INPUTS}, {_SAVED}, {_FORM}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor d_exponent, Tensor d_initial)",
    _backward,
    _gradients,
)
