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
    past = cos.shape[1] - q.shape[1]
    (a, b, rest), c, s = _pairs(q, cos[:, past:], sin[:, past:])
    if form == "slack":
        first, second = a * (a * c - b * s), b * (b * c + a * s)
    else:
        norm = a.square() + b.square()
        first, second = norm * c, norm * s
    return (torch.cat((first, second, rest.square()), dim=-1) * scale).to(q.dtype)


def collinear_key(t: Tensor, cos: Tensor, sin: Tensor, *, form: str, tie: str) -> Tensor:
    """The key that belongs to `collinear_query`: the coefficients, rotated to their place.

    With the coefficients (t, t') of a rotary pair at position n (t = t' where it is tied): slack R_n (t, t'), strict
    t (cos, sin). Channels that are not rotated keep theirs.

    Args:
        t: `[B, S, G, K/2]` from `collinear_coefficients`.
        cos, sin: `[B, S, r/2]`.
        form: `"slack"` or `"strict"`.
        tie: `"rotary"` or `"head"`.

    Returns:
        `[B, S, G, K]` in t's dtype.
    """
    (a, b, rest), c, s = _pairs(spread(t, 2 * cos.shape[-1], tie), cos, sin)
    first, second = (a * c - b * s, b * c + a * s) if form == "slack" else (a * c, a * s)
    return torch.cat((first, second, rest), dim=-1).to(t.dtype)


def tied_means(raw: Tensor, rotary_dim: int, tie: str) -> Tensor:
    """The mean of every tied pair of channels, `[..., K]` → `[..., K/2]`."""
    sizes = _blocks(raw.shape[-1], rotary_dim, tie)
    return torch.cat([block.unflatten(-1, (2, -1)).mean(-2) for block in raw.split(sizes, dim=-1)], dim=-1)


def spread(t: Tensor, rotary_dim: int, tie: str) -> Tensor:
    """Gives both channels of every tied pair their coefficient, `[..., K/2]` → `[..., K]`."""
    sizes = [size // 2 for size in _blocks(2 * t.shape[-1], rotary_dim, tie)]
    return torch.cat([half for block in t.split(sizes, dim=-1) for half in (block, block)], dim=-1)


def _blocks(width: int, rotary_dim: int, tie: str) -> list[int]:
    """Widths of the blocks of channels whose halves are tied to each other."""
    return [width] if tie == "head" else [size for size in (rotary_dim, width - rotary_dim) if size]


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Both channels of the rotary pairs (j, j + r/2), the channels that are not rotated, and the table; all wide."""
    dtype, half = compute_dtype(x), cos.shape[-1]
    parts = x.to(dtype).split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return parts, cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
