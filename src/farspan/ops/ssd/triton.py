"""State space duality through kernels: walks for states and their gradients, then everything by chunks."""

import functools
from typing import Any

import torch
from torch import Tensor

from farspan.ops._contract import compute_dtype, plain_backward
from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.gated_linear import rows
from farspan.ops.gated_linear.plan import Plan, cut, most_chunks, plan_chunks
from farspan.ops.gated_linear.rows import Walk
from farspan.ops.gated_linear.triton import gated_linear_attention_triton
from farspan.ops.ssd.kernels import output_kernel, shared_gradient_kernel, value_gradient_kernel
from farspan.ops.ssd.reference import step_size, through

# Most stages of the kernels for outputs, for what the heads of a group share, and for values.
OUTPUT, SHARED, VALUE = 3, 2, 1
WARPS = 4


def state_space_duality_triton(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernels' form of `state_space_duality`; arguments and results as the reference's."""
    if x.shape[-1] > widest(c.dtype):
        return through(gated_linear_attention_triton, x, dt, a, b, c, d, **options)
    dtype = compute_dtype(dt)
    step = step_size(dt.to(dtype), options["dt_bias"], options["dt_softplus"], options["dt_limit"])
    decay = step * a.to(dtype)
    tensors = (None if t is None else t.contiguous() for t in (c, b, x, step, decay, d, options["initial_state"]))
    out, final = _Duality.apply(*tensors, options["cu_seqlens"])
    return out, final


def widest(dtype: torch.dtype) -> int:
    """Value channels per head that these kernels hold; beyond, gated linear attention's serve.

    In float32 the tiles of a chunk of 128 channels are more than the shared memory of a card.
    """
    return rows.WIDEST // 2 if dtype == torch.float32 else rows.WIDEST


class _Duality(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, final, states = duality_node(*arguments)
        if not torch.compiler.is_compiling():  # where a missing gradient costs nothing anyway
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, states)
        return out, final

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dq, dk, dv, dw, d_decay, d_skip, d_initial = duality_gradient_node(*gradients, *ctx.saved_tensors)
        skip, initial = ctx.saved_tensors[5:7]
        d_own_skip = None if skip is None else d_skip.to(skip.dtype)
        return dq, dk, dv, dw, d_decay, d_own_skip, None if initial is None else d_initial.to(initial.dtype), None


def _results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    log_decay: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    batch, length, heads, values = v.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(sequences, heads, q.shape[3], values, dtype=torch.float32)
    chunks = most_chunks(length, batch, cu_seqlens, rows.CHUNK)
    return torch.empty_like(v), final, v.new_empty(chunks, heads, q.shape[3], values)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    log_decay: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    results = _results(q, k, v, w, log_decay, skip, initial, cu_seqlens)
    if v.numel() == 0:
        results[1].zero_() if initial is None else results[1].copy_(initial)
        return results
    with torch.cuda.device_of(q):
        kinds = (t is not None and t.dtype for t in (q, k, v, skip, initial))
        key = ("state_space_duality", q.device, q.shape[3], v.shape[3], *kinds)
        compile_ahead(key, lambda: _rehearse(q, k, v, w, log_decay, skip, initial))
        _run(_plan(v, cu_seqlens), q, k, v, w, log_decay, skip, initial, results)
    return results


def _run(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    log_decay: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    results: tuple[Tensor, ...],
) -> None:
    out, final, states = results
    walk = Walk(q, k, v, b=w, log_decay=log_decay)
    walk.run(plan, None, walk.between(plan, initial, final), final, states=states)
    arguments = (q, k, v, w, log_decay, w if skip is None else skip, states, out, plan.chunks)
    _launch(output_kernel, plan, q, v, arguments, OUTPUT, HAS_SKIP=skip is not None)


def _gradients(
    d_out: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    log_decay: Tensor,
    skip: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, ...]:
    _, d_initial, _ = _results(q, k, v, w, log_decay, skip, initial, cu_seqlens)
    d_skip = v.new_empty(0 if skip is None else v.shape[2], dtype=torch.float32)
    return *(torch.empty_like(t) for t in (q, k, v, w, log_decay)), d_skip, d_initial


def _backward(d_out: Tensor | None, d_final: Tensor | None, *saved: Any) -> tuple[Tensor, ...]:
    results = _gradients(d_out, d_final, *saved)
    q, v, cu_seqlens = saved[0], saved[2], saved[7]
    if v.numel() == 0:
        for gradient in results:
            gradient.zero_()
        if d_final is not None:
            results[-1].copy_(d_final)
        return results
    d_out = torch.zeros_like(v) if d_out is None else d_out.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    with torch.cuda.device_of(q):
        _run_backward(_plan(v, cu_seqlens), d_out, d_final, saved, results)
    return results


def _run_backward(
    plan: Plan, d_out: Tensor, d_final: Tensor | None, saved: tuple[Any, ...], results: tuple[Tensor, ...]
) -> None:
    q, k, v, w, log_decay, skip, _, _, states = saved
    dq, dk, dv, dw, d_decay, d_skip, d_initial = results
    d_states = torch.empty_like(states)
    walk = Walk(k, q, d_out, log_decay=log_decay)
    start = walk.between(plan, d_final, d_initial, reverse=True)
    walk.run(plan, None, start, d_initial, reverse=True, states=d_states)
    parts = w.new_empty(0 if skip is None else plan.chunks.shape[0], v.shape[2], dtype=torch.float32)
    arguments: tuple[Any, ...] = (k, d_out, v, w, log_decay, states, dq, plan.chunks)
    _launch(shared_gradient_kernel, plan, q, v, arguments, SHARED, LATER=False)
    arguments = (q, v, d_out, w, log_decay, d_states, dk, plan.chunks)
    _launch(shared_gradient_kernel, plan, q, v, arguments, SHARED, LATER=True)
    arguments = (
        q, k, v, w, log_decay, w if skip is None else skip, d_out, states, d_states, dv, dw, d_decay, parts,
        plan.chunks,
    )  # fmt: skip
    _launch(value_gradient_kernel, plan, q, v, arguments, VALUE, HAS_SKIP=skip is not None)
    if skip is not None:
        torch.sum(parts, 0, out=d_skip)


def _rehearse(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, log_decay: Tensor, skip: Tensor | None, initial: Tensor | None
) -> None:
    """Makes all launches on sequences of two chunks, cut into two segments and whole."""
    length = 2 * rows.CHUNK
    short = [t.new_empty(1, length, *t.shape[2:]) for t in (q, k, v, w, log_decay)]
    saved: tuple[Any, ...] = (*short, skip, None if initial is None else initial.new_empty(1, *initial.shape[1:]))
    for segment in (length, rows.CHUNK):
        plan = cut([(0, length)], segment, rows.CHUNK, q.device)
        forward: tuple[Any, ...] = (*saved, None)
        out, final, states = _results(*forward)
        forward = (plan, *saved, (out, final, states))
        _run(*forward)
        backward = (*saved, None, states)
        _run_backward(plan, short[2], None, backward, _gradients(None, None, *backward))


def _launch(
    kernel: Any, plan: Plan, q: Tensor, v: Tensor, arguments: tuple[Any, ...], most: int, **switch: bool
) -> None:
    """One program per chunk and group."""
    heads, groups = v.shape[2], q.shape[2]
    constants = _constants(q.dtype, q.shape[3], v.shape[3], rows.CHUNK, most, *switch.items())
    sizes = heads, heads // groups
    launch(kernel, (plan.chunks.shape[0], groups), (*arguments, *sizes), constants, WARPS, constants["STAGES"])


@functools.cache
def _constants(
    dtype: torch.dtype, width: int, values: int, chunk: int, most: int, *switches: tuple[str, int]
) -> Constants:
    shape = {"K": width, "V": values, "BT": chunk, "BK": rows.padded(width), "BV": rows.padded(values)}
    shape["STAGES"] = rows.stages(most, (2 * chunk + shape["BK"]) * shape["BV"], dtype)
    return Constants(shape | dict(switches) | rows.arithmetic(dtype))


def _plan(v: Tensor, cu_seqlens: Tensor | None) -> Plan:
    return plan_chunks(v, cu_seqlens, rows.CHUNK, v.shape[2] * -(-v.shape[3] // rows.NARROWEST))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor w, Tensor log_decay, Tensor? skip, Tensor? initial, Tensor? cu_seqlens"
duality_node = register_node(
    f"state_space_duality_kernels({_INPUTS}) -> (Tensor out, Tensor final, Tensor states)", _forward, _results
)
duality_gradient_node = register_node(
    f"state_space_duality_kernels_gradient(Tensor? d_out, Tensor? d_final, {_INPUTS}, Tensor states) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dw, Tensor d_decay, Tensor d_skip, Tensor d_initial)",
    _backward,
    _gradients,
)
