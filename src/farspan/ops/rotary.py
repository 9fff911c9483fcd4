"""Rotation of pairs of channels by position."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from farspan.errors import ShapeError
from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, compute_dtype, without_autocast


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


def rotary_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    norms: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`apply_rotary` of queries and keys at the same places; on a GPU one kernel forward and one backward.

    With norms, x / sqrt(mean(x²) + eps) · w over the channels comes first; where all channels are rotated, the kernel
    does both in one pass.

    Args:
        q, k: `[B, T, H, K]` and `[B, T, G, K]`.
        cos, sin: `[B, T, r/2]` float32 from `rotary_table`, r ≤ K; constants, no gradient reaches them.
        interleaved: as for `apply_rotary`.
        norms: weights w `[K]` of q and of k; None is no norm.
        norm_eps: epsilon of these norms.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`.

    Returns:
        Both rotated, in their dtypes; formed in float32 and rounded once.

    Raises:
        ShapeError: for shapes or devices that do not fit.
        BackendUnavailable: for a named backend that cannot serve.

    Cost:
        One read and one write of q and k, forward and backward.

    Source: Su et al. 2021, arXiv 2104.09864.

    Example:
        >>> q, turn = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2), torch.ones(1, 1, 1)  # a quarter of a turn
        >>> rotary_pair(q, 2 * q, 0 * turn, turn)[1].flatten().tolist()
        [0.0, 2.0]
    """
    contract = Contract("rotary_pair")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T G K")
    contract.tensor("cos", cos, "B T r/2")
    contract.tensor("sin", sin, "B T r/2")
    if 2 * cos.shape[-1] > q.shape[-1]:
        raise ShapeError(f"rotary_pair: r={2 * cos.shape[-1]} channels cannot be rotated of K={q.shape[-1]}.")
    if norms is None:
        turned: tuple[Tensor, Tensor] = resolve("rotary_pair", backend, (q, k))(q, k, cos, sin, interleaved)
        return turned
    for norm in norms:
        contract.tensor("norms", norm, "K")
    part = "the kernels of norms rotate all channels" if 2 * cos.shape[-1] < q.shape[-1] else None
    implementation = resolve("normed_rotary_pair", backend, (q, k, *norms), beyond_kernels=part)
    with without_autocast(q):
        normed_pair: tuple[Tensor, Tensor] = implementation(q, k, cos, sin, norms, norm_eps, interleaved)
    return normed_pair


def rotary_pair_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """One after the other; arguments as `rotary_pair`."""
    return apply_rotary(q, cos, sin, interleaved), apply_rotary(k, cos, sin, interleaved)


def normed_rotary_pair_torch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor], norm_eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """First the norms, then `rotary_pair`; arguments as there."""
    q, k = (normed(x, w, norm_eps) for x, w in zip((q, k), norms, strict=True))
    return rotary_pair(q, k, cos, sin, interleaved=interleaved)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w over the last dimension, in x's dtype."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


register(
    "rotary_pair",
    reference=rotary_pair_torch,
    torch=rotary_pair_torch,
    triton="farspan.ops.rotary_triton:rotary_pair_triton",
    triton_limits=no_double,
)
register(
    "normed_rotary_pair",
    reference=normed_rotary_pair_torch,
    torch=normed_rotary_pair_torch,
    triton="farspan.ops.rotary_norm_triton:normed_rotary_pair_triton",
    triton_limits=no_double,
)
