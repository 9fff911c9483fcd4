"""Gated linear attention in PyTorch operations: chunks for whole sequences, one update for one token."""

from typing import Any

import torch
from torch import Tensor

from farspan.ops._contract import compute_dtype, plain_backward
from farspan.ops._library import register_node
from farspan.ops.gated_linear.reference import recurrent_update
from farspan.ops.gated_linear.walk import Cut, Walk, times

CHUNK = 32


def gated_linear_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The decoding step: T = 1, every batch row one sequence; arguments and results as the reference's."""
    dtype = compute_dtype(q, k, v, log_decay)
    q, k, values = (x[:, 0].to(dtype) for x in (q, k, v))
    decay = None if log_decay is None else log_decay[:, 0].to(dtype).exp()
    if decay is not None and decay.dim() == 2:
        decay = decay.unsqueeze(-1)
    if initial_state is None:
        state = k.unsqueeze(-1) * values.unsqueeze(-2)
    else:
        state = recurrent_update(initial_state.to(dtype), k, values, decay)
    out = torch.matmul(q.unsqueeze(-2), state) * scale
    return out.transpose(1, 2).to(v.dtype), state


def gated_linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The form for whole sequences, in chunks; arguments and results as the reference's."""
    out, final = _Chunked.apply(q, k, v, log_decay, initial_state, cu_seqlens, scale)
    return out, final


class _Chunked(torch.autograd.Function):
    """Two nodes: the chunked recurrence, and its gradient from the states that entered the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, final, entering = chunked_node(q, k, v, log_decay, initial, cu_seqlens, scale)
        ctx.save_for_backward(q, k, v, log_decay, initial, cu_seqlens, entering)
        ctx.scale = scale
        return out, final

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial, cu_seqlens, entering = ctx.saved_tensors
        dq, dk, dv, d_decay, d_initial = chunked_gradient_node(
            *gradients, q, k, v, log_decay, cu_seqlens, entering, ctx.scale
        )
        return (
            dq,
            dk,
            dv,
            None if log_decay is None else d_decay,
            None if initial is None else d_initial.to(initial.dtype),
            None,
            None,
        )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walks segments of chunks that fit the cache, so that the time per token does not grow with T."""
    out, final, entering = _results(q, k, v, log_decay, initial, cu_seqlens, scale)
    if initial is None:
        final.zero_()
    else:
        final.copy_(initial)
    if v.numel() == 0 or q.numel() == 0:
        return out.zero_(), final, entering
    cut = Cut.of(q, cu_seqlens, CHUNK)
    last = final.view(cut.streams(final))
    start = last.clone()
    walk = Walk(cut, q, k, v, log_decay, final.dtype, scale)
    into, state = walk.room(v), start[:0]
    for part in walk.parts:
        queries, keys, values, decays = walk.load(part)
        written = torch.bmm(times(keys, decays.to_end).mT, values)
        order = range(part.start, part.stop)
        state = walk.scan(order, written, decays.whole, entering[part], state, start, last)
        result = torch.bmm(times(queries, decays.from_start), entering[part].flatten(0, 1))
        for block in decays.blocks:
            block.rows(result).baddbmm_(block.scores(queries, keys), block.columns(values))
        walk.store(result, into, part)
    return cut.unpad(into, v), final, entering


def _backward(
    d_out: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entering: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """The same walk from the end: the gradient of the state that leaves each chunk, and all others from it."""
    d_initial = d_final.clone(memory_format=torch.contiguous_format)
    if v.numel() == 0 or q.numel() == 0:
        empty = _gradients(d_out, d_final, q, k, v, log_decay, cu_seqlens, entering, scale)
        return *(x.zero_() for x in empty[:4]), d_initial
    cut = Cut.of(q, cu_seqlens, CHUNK)
    d_first = d_initial.view(cut.streams(d_initial))
    end = d_first.clone()
    walk = Walk(cut, q, k, v, log_decay, entering.dtype, scale)
    d_out = cut.pad(d_out)
    dq, dk, dv = walk.room(q), walk.room(k), walk.room(v)
    d_decay = None if walk.log_decay is None else torch.empty_like(walk.log_decay)
    d_state = end[:0]
    for part in reversed(walk.parts):
        queries, keys, values, decays = walk.load(part)
        given, starting = walk.view(d_out, part), entering[part].flatten(0, 1)
        read = torch.bmm(times(queries, decays.from_start).mT, given)
        d_ending = torch.empty_like(entering[part])
        order = range(part.stop - 1, part.start - 1, -1)
        d_state = walk.scan(order, read, decays.whole, d_ending, d_state, end, d_first)
        d_ending = d_ending.flatten(0, 1)
        d_queries = times(torch.bmm(given, starting.mT), decays.from_start)
        d_keys = times(torch.bmm(values, d_ending.mT), decays.to_end)
        d_values = torch.bmm(times(keys, decays.to_end), d_ending)
        if decays.whole is not None:  # rowsum(S_end * dS_end): what the chunk wrote, and what it kept
            kept = decays.whole.mT * (starting * d_ending).sum(-1).unsqueeze(-2)
            at_end = (keys * d_keys).sum(-2, keepdim=True) + kept
        for block in decays.blocks:
            block.columns(d_values).baddbmm_(block.scores(queries, keys).mT, block.rows(given))
            d_scores = block.select(torch.bmm(block.rows(given), block.columns(values).mT))
            block.rows(d_queries).add_(times(torch.bmm(d_scores, block.keys(keys)), block.query_factor))
            block.columns(d_keys).add_(times(torch.bmm(d_scores.mT, block.queries(queries)), block.key_factor))
        if d_decay is not None:
            local = queries * d_queries - keys * d_keys
            if d_decay.shape[-1] == 1:
                local, at_end = local.sum(-1, keepdim=True), at_end.sum(-1, keepdim=True)
            walk.store(local.flip(-2).cumsum(-2).flip(-2) + at_end, d_decay, part)
        walk.store(d_queries.mul_(walk.scale), dq, part)
        walk.store(d_keys, dk, part)
        walk.store(d_values, dv, part)
    if log_decay is None or d_decay is None:
        d_own = q.new_empty(0)
    else:
        d_own = cut.unpad(d_decay, log_decay)
    return cut.unpad(dq, q), cut.unpad(dk, k), cut.unpad(dv, v), d_own, d_initial


def _results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the outputs, the final state, and the state entering each of at most so many chunks."""
    dtype = compute_dtype(q, k, v, log_decay)
    if initial is not None:
        dtype = torch.promote_types(dtype, initial.dtype)
    batch, length, heads, width = q.shape
    chunks, streams, sequences = -(-length // CHUNK), batch * heads, batch
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        chunks += sequences
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = q.new_empty(sequences, heads, width, v.shape[-1], dtype=dtype)
    return out, final, q.new_empty(chunks, streams, width, v.shape[-1], dtype=dtype)


def _gradients(
    d_out: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entering: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Room for the gradients; that of the log decay is empty where there is none."""
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_decay) if x is not None]
    if log_decay is None:
        like.append(q.new_empty(0))
    return *like, torch.empty_like(d_final, memory_format=torch.contiguous_format)


chunked_node = register_node(
    "gated_linear_chunked(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial, Tensor? cu_seqlens, "
    "float scale) -> (Tensor out, Tensor final, Tensor entering)",
    _forward,
    _results,
)
chunked_gradient_node = register_node(
    "gated_linear_chunked_gradient(Tensor d_out, Tensor d_final, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
    "Tensor? cu_seqlens, Tensor entering, float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_decay, "
    "Tensor d_initial)",
    _backward,
    _gradients,
)
