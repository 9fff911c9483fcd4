"""Cosine attention in PyTorch operations: chunks when causal, the cheaper order of two products otherwise."""

from collections.abc import Callable

import torch
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype
from farspan.ops.bidirectional import both_ways
from farspan.ops.cosine.reference import Call
from farspan.ops.gated_linear.torch import gated_linear_attention_chunked, gated_linear_attention_recurrent


def cosine_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """The fast form of `cosine_attention`; arguments and results as the reference's."""
    one_token = call.cu_seqlens is None and q.shape[1] == 1
    mix = gated_linear_attention_recurrent if one_token else gated_linear_attention_chunked
    return attend(mix, q, k, v, initial_state, call)


def attend(
    mix: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor | None]:
    """Cosine attention around any form of gated linear attention; the weights and norms cost one product each."""
    dtype = compute_dtype(q, k, v, initial_state)
    query_factor, key_factor = call.factors(dtype)
    queries = _weighted_unit(q.to(dtype), query_factor, call.eps)
    keys = _weighted_unit(k.to(dtype), key_factor, call.eps)
    if call.causal:
        return mix(queries, keys, v, None, scale=1.0, initial_state=initial_state, cu_seqlens=call.cu_seqlens)
    values = v.to(dtype)
    if call.cu_seqlens is None:
        return _all_pairs(queries, keys, values).to(v.dtype), None
    if torch.compiler.is_compiling():  # no shape may depend on a boundary

        def looking_back(*tensors: Tensor) -> Tensor:
            return mix(*tensors, None, scale=1.0, initial_state=None, cu_seqlens=call.cu_seqlens)[0]

        itself = (queries * keys).sum(-1, keepdim=True) * values  # both directions count it
        return (both_ways(looking_back, queries, keys, values, cu_seqlens=call.cu_seqlens) - itself).to(v.dtype), None
    documents = [_all_pairs(*(x[:, a:b] for x in (queries, keys, values))) for a, b in varlen.spans(call.cu_seqlens)]
    return (torch.cat(documents, dim=1) if documents else values).to(v.dtype), None


def _weighted_unit(x: Tensor, factor: Tensor | None, eps: float) -> Tensor:
    """`factor · x / max(‖x‖, eps)`."""
    norm = torch.linalg.vector_norm(x, dim=-1).clamp_min(eps)
    return x * (norm.reciprocal() if factor is None else factor / norm).unsqueeze(-1)


def _all_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`(q kᵀ) v` over `[B, T, H, ·]`, as `q (kᵀ v)` from the length on at which that is cheaper."""
    length, width, value_width = q.shape[1], q.shape[-1], v.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    state_is_cheaper = length * (width + value_width) >= 2 * width * value_width
    out = q @ (k.mT @ v) if state_is_cheaper else (q @ k.mT) @ v
    return out.transpose(1, 2)
