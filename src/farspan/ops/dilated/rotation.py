"""Positions as complex rates: channel pairs turn, and grow or shrink, by a factor per position."""

import torch
from torch import Tensor

from farspan.errors import ShapeError
from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, without_autocast


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


def turn_factors(
    places: Tensor, window: int, frequencies: Tensor, growth: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """What `turn_pair` multiplies queries and keys by at these places, which count from the middle of their windows.

    Args:
        places: `[…]` integer, from the start of a sequence.
        window: tokens from one middle to the next, such that no query sees a key of another window.
        frequencies, growth: `[K/2]`, as for `rotation_table`.
        dtype: float32, or float64 for queries in float64.

    Returns:
        `[4, P, K/2]` of that dtype, real and imaginary parts for queries, then for keys, and the row of each place,
        `[…]` int32: P is the window or the number of places, whichever is less.
    """
    inside, count = places % window, places.numel()
    if count < window:
        table, rows = inside.flatten(), torch.arange(count, device=places.device).view(places.shape)
    else:
        table, rows = torch.arange(window, device=places.device), inside
    sides = [rotation_table(table - (window - 1) / 2, frequencies, growth, key=key) for key in (False, True)]
    return torch.stack([part for side in sides for part in (side.real, side.imag)]).to(dtype), rows.int()


def turn_pair(q: Tensor, k: Tensor, factors: Tensor, rows: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Multiplies pairs of channels (2j, 2j + 1), read as complex numbers, by the factor of their place.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, G, K]`.
        factors, rows: `[4, P, K/2]` and `[B, T]` from `turn_factors`; constants, no gradient reaches them.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`.

    Returns:
        Both in their dtypes; formed in float32 (float64 for float64) and rounded once.

    Raises:
        ShapeError: for shapes or devices that do not fit, and an odd K.
        BackendUnavailable: for a named backend that cannot serve.

    Cost:
        One read and one write of q and k, forward and backward.

    Source: Sun et al. 2022, arXiv 2212.10554.

    Example:
        >>> factors, rows = turn_factors(torch.arange(3).view(1, 3), 3, torch.tensor([torch.pi]), torch.zeros(1))
        >>> q = torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2)
        >>> turn_pair(q, 2 * q, factors, rows)[1][..., 0].flatten().tolist()  # half a turn a place
        [-2.0, 2.0, -2.0]
    """
    contract = Contract("turn_pair")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T G K")
    if q.shape[-1] % 2:
        raise ShapeError(f"turn_pair: pairs of channels are turned, but K={q.shape[-1]} is odd; give an even number.")
    contract.bind("K/2", q.shape[-1] // 2, "q's K")
    contract.bind("4", 4, "two parts each")
    contract.tensor("factors", factors, "4 P K/2")
    contract.mask("rows", rows, "B T")
    with without_autocast(q):
        turned: tuple[Tensor, Tensor] = resolve("turn_pair", backend, (q, k))(q, k, factors, rows)
    return turned


def turn_pair_torch(q: Tensor, k: Tensor, factors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The formula as it stands; arguments as `turn_pair`."""
    parts = factors[:, rows.long()].unsqueeze(3)
    tables = torch.complex(parts[0], parts[1]), torch.complex(parts[2], parts[3])
    return rotate(q, tables[0]).to(q.dtype), rotate(k, tables[1]).to(k.dtype)


register(
    "turn_pair",
    reference=turn_pair_torch,
    torch=turn_pair_torch,
    triton="farspan.ops.dilated.rotation_triton:turn_pair_triton",
    triton_limits=no_double,
)
