"""Cosine attention: how tokens are counted, what the count does, and the formula in its most direct form."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype
from farspan.ops.gated_linear.reference import gated_linear_attention_reference

# Logarithms of the counts of plain batches, by shape; the oldest goes first.
REMEMBERED = 16
_log_places: dict[tuple[Any, ...], Tensor] = {}


class Call(NamedTuple):
    """What an implementation knows of a call beside q, k, v and the state.

    Attributes:
        log_count: logarithm of the tokens counted at each place, `[B, T]`; None without an exponent.
        exponent: before the sigmoid, `[H]`, or None.
        by_query: whether the factor of the length belongs to the queries, rather than to the keys.
        padding_mask: `[B, T]`, True or 1 = token, or None.
        causal: whether a token sees only its past.
        eps: least norm that a query or key is divided by.
        cu_seqlens: boundaries of packed documents, `[num_seqs + 1]` int32, or None.
    """

    log_count: Tensor | None
    exponent: Tensor | None
    by_query: bool
    padding_mask: Tensor | None
    causal: bool
    eps: float
    cu_seqlens: Tensor | None

    def factors(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weights of each token as a query and as a key, broadcastable to `[B, T, H]`; 0 at padding; None for 1."""
        real = None if self.padding_mask is None else (self.padding_mask != 0).to(dtype).unsqueeze(-1)
        if self.log_count is None or self.exponent is None:
            return real, real
        factor = _power(self.log_count, self.exponent)
        if real is not None:
            factor = factor * real
        return (factor, real) if self.by_query else (real, factor)


def count_tokens(
    like: Tensor,
    causal: bool,
    padding_mask: Tensor | None = None,
    initial_count: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """How many real tokens each token counts: up to and including itself, or all of its sequence.

    Args:
        like: a tensor `[B, T, …]`.
        causal: True for the running count, False for the count of the whole sequence.
        padding_mask: `[B, T]`, True or 1 = token; None when all are real.
        initial_count: tokens before the first one, `[B]` (`[num_seqs]` when packed); None means 0.
        cu_seqlens: `[num_seqs + 1]` int32; the count restarts at each boundary.

    Returns:
        `[B, T]` int64; 0 at padding in front of the first real token.
    """
    real = like.new_ones(like.shape[:2], dtype=torch.long) if padding_mask is None else (padding_mask != 0).long()
    running = real.cumsum(1)
    if cu_seqlens is None:
        count = running if causal else running[:, -1:].expand_as(running)
        return count if initial_count is None else count + initial_count.unsqueeze(1)
    sequence = varlen.sequence_ids(cu_seqlens, like.shape[1])
    before = F.pad(running[0], (1, 0))[cu_seqlens.long()]
    count = running - before[sequence] if causal else before.diff()[sequence].unsqueeze(0)
    return count if initial_count is None else count + initial_count[sequence]


def length_factor(count: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """`max(count, 1) ** -sigmoid(exponent)`, formed in the dtype of the accumulation.

    Args:
        count: `[B, T]` integer.
        exponent: `[H]`, before the sigmoid.
        dtype: float32 or float64.

    Returns:
        `[B, T, H]` in `dtype`.
    """
    return _power(count.clamp(min=1).to(dtype).log(), exponent)


def _power(log_count: Tensor, exponent: Tensor) -> Tensor:
    return torch.exp(-torch.sigmoid(exponent.to(log_count.dtype)) * log_count.unsqueeze(-1))


def log_counts(
    like: Tensor,
    causal: bool,
    padding_mask: Tensor | None,
    initial_count: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The logarithm of `max(count_tokens(…), 1)`, `[B, T]` in the given dtype; remembered where it can be."""

    def compute(like: Tensor) -> Tensor:
        return count_tokens(like, causal, padding_mask, initial_count, cu_seqlens).clamp(min=1).to(dtype).log()

    if padding_mask is not None or initial_count is not None or torch.compiler.is_compiling():
        return compute(like)
    if cu_seqlens is not None:
        logarithm: Tensor = varlen.remember(cu_seqlens, ("log counts", causal, dtype), lambda: compute(like))
        return logarithm
    key = (*like.shape[:2], causal, dtype, like.device)
    if key in _log_places:
        return _log_places[key]
    logarithm = compute(like)
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):  # a captured graph computes nothing yet
        if len(_log_places) == REMEMBERED:
            _log_places.pop(next(iter(_log_places)))
        _log_places[key] = logarithm
    return logarithm


def cosine_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """Normalises, weighs, and sums: token by token when causal, over the matrix of all similarities otherwise.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        initial_state: `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed) or None for zeros; causal only.
        call: the rest.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state, None when not causal.
    """
    dtype = compute_dtype(q, k, v, initial_state)
    queries, keys = (F.normalize(x.to(dtype), dim=-1, eps=call.eps) for x in (q, k))
    query_factor, key_factor = call.factors(dtype)
    values = v.to(dtype)
    if query_factor is not None:
        queries = queries * query_factor.unsqueeze(-1)
    if key_factor is not None:
        values = values * key_factor.unsqueeze(-1)
    if call.causal:
        out, state = gated_linear_attention_reference(
            queries, keys, values, None, scale=1.0, initial_state=initial_state, cu_seqlens=call.cu_seqlens
        )
        return out.to(v.dtype), state
    similarities = torch.einsum("bthk,bshk->bhts", queries, keys)
    if call.cu_seqlens is not None:
        document = varlen.sequence_ids(call.cu_seqlens)
        similarities = similarities * (document[:, None] == document[None, :])
    return torch.einsum("bhts,bshv->bthv", similarities, values).to(v.dtype), None
