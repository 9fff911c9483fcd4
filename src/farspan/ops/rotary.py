"""Rotation of pairs of channels by position."""

import torch
from torch import Tensor

from farspan.ops._contract import compute_dtype


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates pairs of the first r channels: (a, b) → (a cos − b sin, b cos + a sin).

    Args:
        x: `[B, T, H, K]`; channels from r on pass through.
        cos, sin: `[B, T, r/2]` float32 from `rotary_table`.
        interleaved: False pairs channels (j, j + r/2), as GPT-NeoX and LLaMA; True pairs (2j, 2j + 1), as GPT-J.

    Returns:
        `[B, T, H, K]` in x's dtype; 16 bits are rotated in float32.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    width, axis = 2 * cos.shape[-1], -1 if interleaved else -2
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = x[..., :width].to(compute_dtype(x)).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(axis)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=axis).flatten(-2).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)
