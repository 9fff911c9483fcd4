"""Gated linear attention, step by step: the definition that every faster form is tested against."""

import torch
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs `S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t`, `o_t = scale q_t S_t` one token at a time.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H]`, `[B, T, H, K]` or None.
        scale: factor of the output.
        initial_state: `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed) or None for zeros.
        cu_seqlens: `[num_seqs + 1]` int32 or None.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state in float32 (float64 for float64 inputs).
    """
    if cu_seqlens is not None:
        return _packed(q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
    dtype = compute_dtype(q, k, v, log_decay)
    batch, _, heads, width = q.shape
    state = v.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    if initial_state is not None:
        state = state + initial_state
    decay = None if log_decay is None else log_decay.to(dtype).exp()
    decays = (None,) * q.shape[1] if decay is None else _per_channel(decay).unbind(1)
    queries, keys, values = (x.to(dtype).unbind(1) for x in (q, k, v))
    outputs = []
    for q_t, k_t, v_t, decay_t in zip(queries, keys, values, decays, strict=True):
        state = recurrent_update(state, k_t, v_t, decay_t)
        outputs.append(scale * (q_t.unsqueeze(-2) @ state).squeeze(-2))
    out = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v, dtype=dtype)
    return out.to(v.dtype), state


def recurrent_update(state: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """One step of the state: `diag(decay) S + k^T v`.

    Args:
        state: `[B, H, K, V]`.
        k: `[B, H, K]`.
        v: `[B, H, V]`.
        decay: `[B, H, K]` or `[B, H, 1]`, in [0, 1]; None for 1.

    Returns:
        `[B, H, K, V]`.
    """
    kept = state if decay is None else decay.unsqueeze(-1) * state
    return torch.addcmul(kept, k.unsqueeze(-1), v.unsqueeze(-2))


def per_head(x: Tensor, heads: int) -> Tensor:
    """`[B, T, G, K]` → `[B, T, H, K]`: head h reads group ⌊h G / H⌋."""
    return x if x.shape[2] == heads else torch.repeat_interleave(x, heads // x.shape[2], dim=2)


def _per_channel(decay: Tensor) -> Tensor:
    return decay if decay.dim() == 4 else decay.unsqueeze(-1)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each document on its own, laid end to end again."""
    results = []
    for index, (start, end) in enumerate(varlen.spans(cu_seqlens)):
        results.append(
            gated_linear_attention_reference(
                q[:, start:end],
                k[:, start:end],
                v[:, start:end],
                None if log_decay is None else log_decay[:, start:end],
                scale=scale,
                initial_state=None if initial_state is None else initial_state[index : index + 1],
                cu_seqlens=None,
            )
        )
    if not results:
        state = v.new_zeros(0, *q.shape[2:], v.shape[-1], dtype=compute_dtype(q, k, v, log_decay))
        return torch.zeros_like(v), state
    return torch.cat([out for out, _ in results], dim=1), torch.cat([state for _, state in results])
