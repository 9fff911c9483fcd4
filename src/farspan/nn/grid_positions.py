"""Positions in the plane: sine and cosine tables, and tables of one grid stretched to another."""

from typing import Any

import torch
from torch import Tensor


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of a position: (sin(p ω_0), …, sin(p ω_{n−1}), cos(p ω_0), …), ω_j = 10000^(−j/n).

    Args:
        positions: `[M]` numbers.
        width: 2n channels, even.

    Returns:
        `[M, width]` float32, formed in float64.

    Source: Vaswani et al. 2017, arXiv 1706.03762; the order of the channels is that of facebookresearch/mae.
    """
    half = width // 2
    rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions.double().unsqueeze(-1) * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def sincos_2d(rows: Tensor, columns: Tensor, width: int, size: int) -> Tensor:
    """Sines and cosines in the plane: the first half of the channels is `sincos` of the column, the second of the row.

    Args:
        rows, columns: `[...]` int64, from 0 to `size` − 1.
        width: D, divisible by 4.
        size: rows and columns of the grid; only a table of that many positions is formed, not of all places.

    Returns:
        `[..., D]` float32.

    Source: He et al. 2021, arXiv 2111.06377; facebookresearch/mae: util/pos_embed.py.
    """
    table = sincos(torch.arange(size, device=rows.device), width // 2)
    return torch.cat((table[columns], table[rows]), dim=-1)


def stretch_grid(table: Tensor, grid: tuple[int, int], target: tuple[int, int], offset: float = 0.0) -> Tensor:
    """A table of positions on one grid, interpolated to another by bicubic splines; itself where the grids are equal.

    Args:
        table: `[rows·columns, D]`, row after row.
        grid: rows and columns of the table.
        target: rows and columns wanted.
        offset: added to `target` where the scale between the grids is formed. DINO's code has 0.1, against rounding,
            which moves the last places by that share of a place; its weights are trained so.

    Returns:
        `[target rows · target columns, D]` in the table's dtype.

    Example:
        >>> stretch_grid(torch.ones(6, 8), (2, 3), (4, 6)).shape
        torch.Size([24, 8])
    """
    if grid == target:
        return table
    image = table.unflatten(0, grid).permute(2, 0, 1).unsqueeze(0)
    to: dict[str, Any] = {"size": target}
    if offset:
        to = {"scale_factor": tuple((new + offset) / old for new, old in zip(target, grid, strict=True))}
    wide = torch.nn.functional.interpolate(image.float(), **to, mode="bicubic", align_corners=False)
    return wide.squeeze(0).flatten(1).T.to(table.dtype)
