"""Rotary position embedding (RoPE) and its scalings, as pure functions of an explicit length.

A scaled RoPE that depends on the length takes that length as an argument, and a generation keeps one length from its
first token to its last. Cached and uncached decoding then agree; transformers' dynamic NTK, which changes its base as
the text grows, does not have this property.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from farspan.errors import ConfigError, nearest

ROPE_TYPES = ("default", "linear", "dynamic", "yarn")
_KEYS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "dynamic": {"rope_theta", "factor", "original_max_position_embeddings"},
    "yarn": {
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def check_rope_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuses unknown types and keys, missing factors and factors that are not above 1 (1 for `dynamic` and `yarn`).

    Raises:
        ConfigError: naming the key, the value and what is accepted.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ConfigError(f"Unknown rope_type {kind!r}: {nearest(str(kind), ROPE_TYPES)}")
    accepted = _KEYS[kind] | {"rope_type", "partial_rotary_factor"}
    for key in parameters:
        if key not in accepted:
            raise ConfigError(f"Unknown key {key!r} for rope_type {kind!r}: {nearest(str(key), accepted)}")
    theta = parameters.get("rope_theta", 10000.0)
    if not isinstance(theta, int | float) or theta <= 0:
        raise ConfigError(f"rope_theta={theta!r} must be a positive number; the usual value is 10000.0.")
    if kind != "default":
        factor = parameters.get("factor")
        if not isinstance(factor, int | float) or factor < 1:
            raise ConfigError(f"rope_type {kind!r} needs a factor of at least 1, got factor={factor!r}.")


def rope_frequencies(
    rotary_dim: int, parameters: Mapping[str, Any], max_position_embeddings: int, context_length: int
) -> tuple[Tensor, float]:
    """The angle per position of each rotary pair, ω_j = θ^(−2j/r) before scaling, j = 0 … r/2 − 1.

    - `default`: ω_j.
    - `linear` (position interpolation): ω_j / factor, at every length.
    - `dynamic` (NTK): with L = `context_length` and M the trained length, for L > M the base becomes
      θ · (factor·L/M − (factor − 1))^(r/(r−2)); unchanged for L ≤ M.
    - `yarn`: blends ω_j (fast pairs) and ω_j / factor (slow pairs) by a ramp between the pairs that turn `beta_fast`
      and `beta_slow` times over M positions; cos and sin are multiplied by 0.1·ln(factor) + 1 (or `attention_factor`).

    Args:
        rotary_dim: r, even; the number of rotated channels of a head.
        parameters: `rope_type`, `rope_theta` and the keys of the type, in Hugging Face's names.
        max_position_embeddings: the trained length M, unless `original_max_position_embeddings` is given.
        context_length: L, the number of positions that this computation will ever see; only `dynamic` depends on it.

    Returns:
        `[r/2]` float32 frequencies (radians per position) and the factor on cos and sin.

    Raises:
        ConfigError: for r = 2 with `dynamic`, whose exponent divides by zero.
    """
    kind = parameters.get("rope_type", "default")
    theta = float(parameters.get("rope_theta", 10000.0))
    factor = float(parameters.get("factor", 1.0))
    trained = int(parameters.get("original_max_position_embeddings") or max_position_embeddings)
    if kind == "dynamic" and context_length > trained:
        if rotary_dim <= 2:
            raise ConfigError("Dynamic NTK needs at least 4 rotary channels a head; use rope_type 'linear' or 'yarn'.")
        theta *= (factor * context_length / trained - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    frequencies = theta**-exponents
    if kind == "linear":
        frequencies = frequencies / factor
    if kind != "yarn":
        return frequencies.float(), 1.0

    def pair_turning(turns: float) -> float:
        """The (fractional) pair index whose angle passes `turns` full turns over the trained length."""
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(parameters.get("beta_fast") or 32.0), pair_turning(parameters.get("beta_slow") or 1.0)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    slow = ((torch.arange(rotary_dim // 2, dtype=torch.float64) - first) / max(last - first, 1e-3)).clamp(0, 1)
    frequencies = frequencies / factor * slow + frequencies * (1 - slow)
    scaling = parameters.get("attention_factor")
    if scaling is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and mscale_all:
            scaling = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
        else:
            scaling = _yarn_scale(factor, 1.0)
    return frequencies.float(), float(scaling)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_table(positions: Tensor, frequencies: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, always formed in float32 (16-bit positions collide beyond 256).

    Args:
        positions: `[B, T]` integer positions.
        frequencies: `[r/2]` float32.
        scaling: factor on both tables.

    Returns:
        Two float32 tensors `[B, T, r/2]`.
    """
    with torch.autocast(positions.device.type, enabled=False):
        angles = positions.unsqueeze(-1).float() * frequencies.to(positions.device)
        return angles.cos() * scaling, angles.sin() * scaling


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates pairs of the first r channels: (a, b) → (a cos − b sin, b cos + a sin).

    Args:
        x: `[B, T, H, K]`; channels from r on pass through.
        cos, sin: `[B, T, r/2]` float32 from `rotary_table`.
        interleaved: False pairs channels (j, j + r/2), as GPT-NeoX and LLaMA; True pairs (2j, 2j + 1), as GPT-J.

    Returns:
        `[B, T, H, K]` in x's dtype.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    width, axis = 2 * cos.shape[-1], -1 if interleaved else -2
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = x[..., :width].float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(axis)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=axis).flatten(-2).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)
