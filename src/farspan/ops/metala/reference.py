"""MetaLA attention: a readable step loop, and the same formulas around the chunked operator."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops._contract import compute_dtype
from farspan.ops.gated_linear.reference import gated_linear_attention_reference


def metala_attention_reference(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    augmentation: Tensor | None,
    *,
    key: Tensor | None,
    scale: float,
    decay_normalizer: float,
    augmentation_inside: bool,
    normalize: bool,
    norm_eps: float,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    recurrence: Callable[..., tuple[Tensor, Tensor]] = gated_linear_attention_reference,
) -> tuple[Tensor, Tensor]:
    """The formulas of `metala_attention` around the recurrence, step by step by default; arguments as there.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state.
    """
    log_decay, k = decay_and_key(gate_logits, key, decay_normalizer, padding_mask)
    out, state = recurrence(
        q, k, v.to(k.dtype), log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    out = augment_and_normalize(out, q, k, v, augmentation, augmentation_inside, normalize, norm_eps)
    return out.to(v.dtype), state


def decay_and_key(
    gate_logits: Tensor, key: Tensor | None, decay_normalizer: float, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The decay `a = logsigmoid(z) / tau` and the key `1 - exp(a)` (or the given one), in float32.

    Padding neither decays nor writes: both are 0 there.

    Args:
        gate_logits: z, `[B, T, H, K]`.
        key: `[B, T, H, K]` or None.
        decay_normalizer: tau.
        padding_mask: `[B, T]`, True = token, or None.

    Returns:
        `log_decay` and `k`, both `[B, T, H, K]` in float32 (float64 for float64 inputs).
    """
    dtype = compute_dtype(gate_logits, key)
    log_decay = F.logsigmoid(gate_logits.to(dtype)) / decay_normalizer
    k = -torch.expm1(log_decay) if key is None else key.to(dtype)
    if padding_mask is not None:
        padded = (padding_mask == 0)[..., None, None]
        log_decay, k = log_decay.masked_fill(padded, 0.0), k.masked_fill(padded, 0.0)
    return log_decay, k


def augment_and_normalize(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    augmentation: Tensor | None,
    augmentation_inside: bool,
    normalize: bool,
    norm_eps: float,
) -> Tensor:
    """Adds `sigmoid(u v)` (or `sigmoid(u) v`) with `u = sum_c q_c k_c w_c`, then normalises every head over V.

    Args:
        out: the recurrent term, `[B, T, H, V]` float32 or float64.
        q: unscaled queries, `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        augmentation: w, `[H, K]`, or None for no augmentation.
        augmentation_inside: whether the sigmoid encloses the product with v.
        normalize: whether to apply the layer normalisation, without weight or bias.
        norm_eps: its epsilon.

    Returns:
        `[B, T, H, V]` in out's dtype.
    """
    if augmentation is not None:
        u = (q.to(k.dtype) * k * augmentation.to(k.dtype)).sum(-1, keepdim=True)
        values = v.to(out.dtype)
        out = out + (torch.sigmoid(u * values) if augmentation_inside else torch.sigmoid(u) * values)
    return F.layer_norm(out, out.shape[-1:], eps=norm_eps) if normalize else out
