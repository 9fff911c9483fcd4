"""Gated linear attention through Triton kernels: the nodes that PyTorch sees, and the gradient around them.

The same kernels serve MetaLA, whose gate, augmentation and normalisation run inside them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops._contract import plain_backward
from farspan.ops._launch import compile_ahead
from farspan.ops._library import has_memory, register_node
from farspan.ops.gated_linear import launches
from farspan.ops.gated_linear.launches import Form
from farspan.ops.gated_linear.plan import cut, most_chunks
from farspan.ops.gated_linear.tiles import chunk_of, widest_of

# Bytes of states from which on the backward pass takes the halves of a batch one after the other.
HALVED = 1 << 26


def gated_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernels' form of `gated_linear_attention`; arguments and results as the reference's.

    A head of more key channels than the kernels hold is several narrower ones, whose outputs add.
    """
    form, (heads, width) = Form(float(scale)), q.shape[2:]
    parts = -(-width // widest_of(q))
    if parts == 1:
        return attend(q, k, v, log_decay, None, initial_state, cu_seqlens, form)

    def split(x: Tensor) -> Tensor:
        """`[B, T, H, K]` as `[B, T, H · parts, K / parts]`, with zeros where K is no multiple."""
        return F.pad(x, (0, -width % parts)).unflatten(3, (parts, -1)).flatten(2, 3)

    if log_decay is not None:
        log_decay = split(log_decay) if log_decay.dim() == 4 else log_decay.repeat_interleave(parts, 2)
    if initial_state is not None:
        initial_state = split(initial_state.movedim(3, 1)).movedim(1, 3)
    values = v.float().repeat_interleave(parts, 2)  # outputs come in this dtype: rounded once, after they are added
    out, final = attend(split(q), split(k), values, log_decay, None, initial_state, cu_seqlens, form)
    out = out.unflatten(2, (heads, parts)).sum(3).to(v.dtype)
    return out, final.unflatten(1, (heads, parts)).flatten(2, 3)[:, :, :width]


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Runs the kernels.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`, or None when the gate gives it.
        v: `[B, T, H, V]`.
        gate: log decay `[B, T, H]` or `[B, T, H, K]`, gate logits `[B, T, H, K]`, or None.
        weight: `[H, K]` of the augmentation, or None.
        initial: `[B or num_seqs, H, K, V]`, or None for zeros.
        cu_seqlens: `[num_seqs + 1]` int32, or None.
        form: the rest.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state in float32.
    """
    tensors = (None if x is None else x.contiguous() for x in (q, k, v, gate, weight, initial))
    out, final = _Attention.apply(*tensors, cu_seqlens, *form)
    return out, final


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, final, *rest = attention_node(*arguments)
        if not torch.compiler.is_compiling():  # where a missing gradient costs nothing anyway
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:7], out, *rest)
        ctx.form, ctx.spent = arguments[7:], False
        return out, final

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, q_tilde, k_tilde, centre, half, u, states, rstd = ctx.saved_tensors
        if ctx.spent:
            _, _, q_tilde, k_tilde, *_ = attention_node(*inputs, *ctx.form)
        given = (*gradients, *inputs, out, q_tilde, k_tilde, centre, half, u, states, rstd, *ctx.form)
        if torch.compiler.is_compiling() or not all(has_memory(x) for x in (*gradients, q_tilde) if x is not None):
            results = attention_gradient_node(*given)
        else:
            # The room of q~ and k~ becomes that of gradients: a later backward of this node makes them anew.
            ctx.spent = True
            results = _backward(*given, room=(q_tilde, k_tilde))
        _, k, _, gate, weight, initial, _ = inputs
        dq, dk, dv, d_gate, d_weight, d_initial = results
        return (
            dq,
            None if k is None else dk,
            dv,
            None if gate is None else d_gate,
            None if weight is None else d_weight,
            None if initial is None else d_initial.to(initial.dtype),
            *[None] * 7,
        )


def _results(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    *form: Any,
) -> tuple[Tensor, ...]:
    """Room for the outputs, and for what the gradient needs: `Prepared`, the state in front of every chunk, rstd."""
    batch, length, heads, width = q.shape
    chunks = most_chunks(length, batch, cu_seqlens, chunk_of(q))
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    centre = q.new_empty(
        0 if gate is None else chunks, heads, width, dtype=torch.float64 if q.dtype == torch.float32 else torch.float32
    )
    return (
        torch.empty_like(v),
        q.new_empty(sequences, heads, width, v.shape[-1], dtype=torch.float32),
        torch.empty_like(q),
        torch.empty_like(q),
        centre,
        torch.empty_like(centre),
        q.new_empty(0 if weight is None else batch, length, heads, dtype=torch.float32),
        q.new_empty(chunks, heads, width, v.shape[-1]),
        q.new_empty(batch if Form(*form).normalize else 0, length, heads, dtype=torch.float32),
    )


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    *form: Any,
) -> tuple[Tensor, ...]:
    results = _results(q, k, v, gate, weight, initial, cu_seqlens, *form)
    if v.numel() == 0:
        final = results[1]
        final.zero_() if initial is None else final.copy_(initial)
        return results
    with torch.cuda.device_of(q):
        kinds = (x is not None and x.dtype for x in (q, k, v, gate, weight, initial))
        key = ("gated_linear", q.device, q.shape[3], v.shape[3], gate is not None and gate.dim(), *kinds, *form[1:4])
        compile_ahead(key, lambda: _rehearse(q, k, v, gate, weight, initial, form))
        launches.run(q, k, v, gate, weight, initial, results, launches.plan_of(q, v, cu_seqlens), Form(*form))
    return results


def _gradients(
    d_out: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    *rest: Any,
    room: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, ...]:
    """Room for the gradients, empty where there is no such tensor; that of the initial state last.

    Where `room` is given and of the right dtype, those of q and of what the key comes from have it.
    """

    def like(x: Tensor | None, room: Tensor | None = None) -> Tensor:
        if x is None:
            return q.new_empty(0)
        # `.data`: whoever changes a gradient in place does not change what the node keeps, in autograd's eyes.
        return torch.empty_like(x) if room is None or room.dtype != x.dtype else room.data

    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_initial = q.new_empty(sequences, *q.shape[2:], v.shape[-1], dtype=torch.float32)
    d_key = like(gate if k is None else k, room[1])
    dk, d_gate = (like(k), d_key) if k is None else (d_key, like(gate))
    return like(q, room[0]), dk, like(v), d_gate, like(weight), d_initial


def _backward(
    d_out: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    *rest: Any,
    room: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, ...]:
    results = _gradients(d_out, d_final, q, k, v, gate, weight, initial, cu_seqlens, out, *rest, room=room)
    if v.numel() == 0:
        for gradient in results:
            gradient.zero_()
        if d_final is not None:
            results[-1].copy_(d_final)
        return results
    d_out = torch.zeros_like(v) if d_out is None else d_out.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    *grads, d_weight, d_initial = results
    form, states = Form(*rest[7:]), rest[5]
    parts = 2 if form.normalize and _large(states) and cu_seqlens is None and len(q) % 2 == 0 else 1
    with torch.cuda.device_of(q):
        plan = launches.plan_of(q, v, cu_seqlens)
        shares = q.new_empty(0 if weight is None else len(plan.chunks), *q.shape[2:], dtype=torch.float32)
        rows: tuple[Any, ...] = (d_out, d_final, q, k, v, gate, initial, out, *rest[:7], *grads, shares, d_initial)
        split = ([x] * parts if parts == 1 or x is None else x.tensor_split(parts) for x in rows)
        for part in zip(*split, strict=True):
            (dy, d_end, own_q, own_k, own_v, own_gate, start, y), saved, own = part[:8], part[8:15], part[15:]
            launches.run_backward(
                dy, d_end, own_q, own_k, own_v, own_gate, weight, start, y, saved, own, plan.part(parts), form
            )
        if weight is not None:
            # One number per chunk and channel, summed as a product with ones, which is faster than `sum` here.
            total = d_weight if weight.dtype == torch.float32 else torch.empty_like(weight, dtype=torch.float32)
            torch.mv(shares.flatten(1).T, shares.new_ones(len(shares)), out=total.view(-1))
            if total is not d_weight:
                d_weight.copy_(total)
    return results


def _large(states: Tensor) -> bool:
    """Whether half a batch is work enough, so that what only the backward pass needs takes the room of a half."""
    return states.numel() * states.element_size() >= HALVED


def _rehearse(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    form: tuple[Any, ...],
) -> None:
    """Makes all launches on sequences of a few chunks, cut into several segments and whole."""
    chunk = chunk_of(q)
    length = 2 * chunk

    def short(x: Tensor) -> Tensor:
        return x.new_empty(1, length, *x.shape[2:])

    q, k, v, gate = short(q), k if k is None else short(k), short(v), gate if gate is None else short(gate)
    start = None if initial is None else initial.new_empty(1, *initial.shape[1:])
    for segment in (length, chunk):
        plan = cut([(0, length)], segment, chunk, q.device)
        results = _results(q, k, v, gate, weight, start, None, *form)
        launches.run(q, k, v, gate, weight, start, results, plan, Form(*form))
        gradients = _gradients(v, None, q, k, v, gate, weight, start, None, v)
        shares = q.new_empty(len(plan.chunks), *q.shape[2:], dtype=torch.float32)
        gradients = (*gradients[:4], shares, gradients[5])
        launches.run_backward(v, None, q, k, v, gate, weight, start, v, results[2:], gradients, plan, Form(*form))


_FORM = "float scale, bool from_logits, float normalizer, bool inside, bool normalize, float eps"
_SAVED = ("q_tilde", "k_tilde", "centre", "half", "u", "states", "rstd")
_INPUTS = "Tensor q, Tensor? k, Tensor v, Tensor? gate, Tensor? weight, Tensor? initial, Tensor? cu_seqlens"

attention_node = register_node(
    f"gated_linear_kernels({_INPUTS}, {_FORM}) -> "
    f"(Tensor out, Tensor final, {', '.join('Tensor ' + name for name in _SAVED)})",
    _forward,
    _results,
)
attention_gradient_node = register_node(
    f"gated_linear_kernels_gradient(Tensor? d_out, Tensor? d_final, {_INPUTS}, Tensor out, "
    f"{', '.join('Tensor ' + name for name in _SAVED)}, {_FORM}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor d_gate, Tensor d_weight, Tensor d_initial)",
    _backward,
    _gradients,
)
