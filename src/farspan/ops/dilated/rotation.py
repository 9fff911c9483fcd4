"""Positions as complex rates: channel pairs turn, and grow or shrink, by a factor per position."""

import torch
from torch import Tensor


def rotation_table(positions: Tensor, frequencies: Tensor, growth: Tensor, *, key: bool = False) -> Tensor:
    """e^{(±g + iω)·p}, with + for queries and − for keys, formed in float64.

    Args:
        positions: `[…]` p, integer or half-integer; small numbers (relative to a nearby centre) keep it finite.
        frequencies: `[K/2]` ω, radians per position.
        growth: `[K/2]` g, natural logarithm of the growth per position.
        key: whether the table is for keys.

    Returns:
        `[…, K/2]` complex128.
    """
    place = positions.double().unsqueeze(-1)
    size = (place * (-growth if key else growth).double()).exp()
    return torch.polar(size, place * frequencies.double())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Multiplies the complex numbers x_{2j} + i·x_{2j+1} by the table, in float32 (float64 for float64).

    Args:
        x: `[…, K]`.
        table: `[…, K/2]` complex, broadcast against x's pairs. Its conjugate gives the adjoint map.

    Returns:
        `[…, K]` float32 or float64.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    narrow = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    return torch.view_as_real(pairs * table.to(narrow)).flatten(-2)
