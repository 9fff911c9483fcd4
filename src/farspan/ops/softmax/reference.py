"""The formula of softmax attention with an explicit score matrix."""

import torch
from torch import Tensor


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which key each query sees, `[B or 1, T, S]` bool; the last query stands at the last key.

    A window counts real keys, so that padding between two tokens does not push one out of the other's sight.
    """
    if key_mask is None:
        rank = torch.arange(keys, device=device).unsqueeze(0)
        seen = torch.ones((1, queries, keys), dtype=torch.bool, device=device)
    else:
        rank = key_mask.long().cumsum(-1) - 1
        seen = key_mask.unsqueeze(1).expand(-1, queries, -1)
    if causal:
        place = torch.arange(keys, device=device)
        seen = seen & (place[keys - queries :, None] >= place[None, :])
    if window is not None:
        distance = rank[:, keys - queries :, None] - rank[:, None, :]
        seen = seen & (distance < window) & (True if causal else distance > -window)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(keys, device=device), cu_seqlens[1:].long(), right=True)
        seen = seen & (document[keys - queries :, None] == document[None, :])
    return seen


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """See `softmax_attention`; O(T·S) memory."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    keys = k.to(wide).repeat_interleave(group, dim=2)
    values = v.to(wide).repeat_interleave(group, dim=2)
    seen = visible(
        q.shape[1],
        k.shape[1],
        causal=causal,
        window=window,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        device=q.device,
    ).unsqueeze(1)
    scores = torch.einsum("bthk,bshk->bhts", q.to(wide), keys) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    # A row without any key gives 0, not 0/0.
    weights = torch.softmax(scores, dim=-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("bhts,bshv->bthv", weights, values).to(v.dtype)
