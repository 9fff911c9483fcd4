"""Collinear attention: the coefficients t, and the query and key that make it plain softmax attention."""

from typing import Any

import torch
from torch import Tensor

from farspan.ops._contract import compute_dtype
from farspan.ops.softmax.reference import softmax_attention_reference


def collinear_attention_reference(
    q: Tensor, t: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, form: str, tie: str, scale: float, **visibility: Any
) -> Tensor:
    """See `collinear_attention`; O(T·S) memory."""
    query = collinear_query(q, cos, sin, form=form, scale=scale)
    key = collinear_key(t, cos, sin, form=form, tie=tie)
    return softmax_attention_reference(query, key, v, scale=1.0, **visibility)


def collinear_query(q: Tensor, cos: Tensor, sin: Tensor, *, form: str, scale: float) -> Tensor:
    """The query whose dot products with `collinear_key` are the scores; quadratic in q.

    From the rotary pair (a, b) at position m: slack (a, b) ∘ R_m (a, b), strict (a² + b²)(cos, sin). Channels that are
    not rotated are squared. Formed in float32 with the scale inside, and rounded once.

    Args:
        q: `[B, T, H, K]`.
        cos, sin: `[B, S, r/2]`, S ≥ T; the queries stand at the last T places.
        form: `"slack"` or `"strict"`.
        scale: factor on the scores.

    Returns:
        `[B, T, H, K]` in q's dtype.
    """
    past, half = cos.shape[1] - q.shape[1], cos.shape[-1]
    q_wide, c, s = _wide(q, cos[:, past:], sin[:, past:])
    a, b, rest = q_wide.split((half, half, q.shape[-1] - 2 * half), dim=-1)
    if form == "slack":
        first, second = a * (a * c - b * s), b * (b * c + a * s)
    else:
        norm = a.square() + b.square()
        first, second = norm * c, norm * s
    return (torch.cat((first, second, rest.square()), dim=-1) * scale).to(q.dtype)


def collinear_key(t: Tensor, cos: Tensor, sin: Tensor, *, form: str, tie: str) -> Tensor:
    """The key that belongs to `collinear_query`: the coefficients, rotated to their place.

    At position n, a tied rotary pair with the coefficient t: slack R_n (t, t) = t (cos − sin, cos + sin), strict
    t (cos, sin); a pair that is not tied, (t, t'): slack R_n (t, t'). Channels that are not rotated keep theirs.

    Args:
        t: `[B, S, G, K/2]` from `collinear_coefficients`.
        cos, sin: `[B, S, r/2]`.
        form: `"slack"` or `"strict"`.
        tie: `"rotary"` or `"head"`.

    Returns:
        `[B, S, G, K]` in t's dtype.
    """
    half, channels = cos.shape[-1], 2 * t.shape[-1]
    t_wide, c, s = _wide(t, cos, sin)
    if tie == "rotary" or 2 * half == channels:
        first, second = (c - s, c + s) if form == "slack" else (c, s)
        pairs, rest = t_wide.split((half, channels // 2 - half), dim=-1)
        key = torch.cat((pairs * first, pairs * second, rest, rest), dim=-1)
    else:
        spread = torch.cat((t_wide, t_wide), dim=-1)
        a, b, rest = spread.split((half, half, channels - 2 * half), dim=-1)
        key = torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1)
    return key.to(t.dtype)


def tied_means(raw: Tensor, rotary_dim: int, tie: str) -> Tensor:
    """The mean of every tied pair of channels, `[..., K]` → `[..., K/2]`."""
    width = raw.shape[-1]
    # The halves of each block are tied to each other.
    blocks = [width] if tie == "head" else [size for size in (rotary_dim, width - rotary_dim) if size]
    return torch.cat([block.unflatten(-1, (2, -1)).mean(-2) for block in raw.split(blocks, dim=-1)], dim=-1)


def _wide(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensor `[B, S, H, K]` and its table `[B, S, 1, r/2]` in the dtype of computation."""
    dtype = compute_dtype(x)
    return x.to(dtype), cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
