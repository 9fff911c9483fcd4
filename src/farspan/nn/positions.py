"""Positions as pure functions: rotary embedding (RoPE) with its scalings, xPos, ALiBi and T5's relative bias.

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
from farspan.nn.options import fits, words
from farspan.ops.dilated.rotation import rotate, rotation_table
from farspan.ops.rotary import apply_rotary as apply_rotary

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_KEYS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": float},
    "linear": {"rope_theta": float, "factor": float},
    "dynamic": {"rope_theta": float, "factor": float, "original_max_position_embeddings": int | None},
    "yarn": {
        "rope_theta": float,
        "factor": float,
        "original_max_position_embeddings": int | None,
        "attention_factor": float | None,
        "beta_fast": float | None,
        "beta_slow": float | None,
        "mscale": float | None,
        "mscale_all_dim": float | None,
        "truncate": bool,
    },
    "llama3": {
        "rope_theta": float,
        "factor": float,
        "low_freq_factor": float,
        "high_freq_factor": float,
        "original_max_position_embeddings": int | None,
    },
}


def check_rope_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuses unknown types and keys, and values that no rotation can be formed from.

    Raises:
        ConfigError: naming the key, the value and what is accepted.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ConfigError(f"Unknown rope_type {kind!r}: {nearest(str(kind), ROPE_TYPES)}")
    if "partial_rotary_factor" in parameters:
        raise ConfigError(
            "partial_rotary_factor is an option of the mixers here: set mixer_options.softmax.partial_rotary_factor."
        )
    for key, value in parameters.items():
        if key == "rope_type":
            continue
        if key not in _KEYS[kind]:
            raise ConfigError(f"Unknown key {key!r} for rope_type {kind!r}: {nearest(str(key), _KEYS[kind])}")
        if not fits(value, _KEYS[kind][key]):
            raise ConfigError(
                f"rope_parameters: {key}={value!r} is of the wrong type; accepted: {words(_KEYS[kind][key])}."
            )
        if value is not None and not isinstance(value, bool) and value <= 0:
            raise ConfigError(f"rope_parameters: {key}={value!r} must be a positive number.")
    if parameters.get("rope_theta", 10000.0) <= 1:
        raise ConfigError(f"rope_theta={parameters['rope_theta']!r} must be above 1; the usual value is 10000.0.")
    if kind != "default" and parameters.get("factor", 0) < 1:
        raise ConfigError(f"rope_type {kind!r} needs a factor of at least 1, got factor={parameters.get('factor')!r}.")
    if (parameters.get("beta_fast") or 32.0) <= (parameters.get("beta_slow") or 1.0):
        raise ConfigError("rope_parameters: beta_fast (turns of the fast pairs, 32) must be above beta_slow (1).")
    if parameters.get("high_freq_factor", 4.0) <= parameters.get("low_freq_factor", 1.0):
        raise ConfigError("rope_parameters: high_freq_factor (4) must be above low_freq_factor (1).")


def rope_frequencies(
    rotary_dim: int,
    parameters: Mapping[str, Any],
    max_position_embeddings: int,
    context_length: int,
    device: torch.device | None = None,
) -> tuple[Tensor, float]:
    """The angle per position of each rotary pair, ω_j = θ^(−2j/r) before scaling, j = 0 … r/2 − 1.

    - `default`: ω_j.
    - `linear` (position interpolation): ω_j / factor, at every length.
    - `dynamic` (NTK): with L = `context_length` and M the trained length, for L > M the base becomes
      θ · (factor·L/M − (factor − 1))^(r/(r−2)); unchanged for L ≤ M.
    - `llama3`: blends ω_j and ω_j / factor by the number of turns n over M positions: all of ω_j from
      `high_freq_factor` turns (4) on, all of ω_j / factor up to `low_freq_factor` turns (1), linear in n between.
    - `yarn`: blends ω_j (fast pairs) and ω_j / factor (slow pairs) by a ramp between the pairs that turn `beta_fast`
      and `beta_slow` times over M positions; cos and sin are multiplied by 0.1·ln(factor) + 1 (or `attention_factor`).

    Args:
        rotary_dim: r, even; the number of rotated channels of a head.
        parameters: `rope_type`, `rope_theta` and the keys of the type, in Hugging Face's names.
        max_position_embeddings: the trained length M, unless `yarn` or `llama3` give
            `original_max_position_embeddings`.
        context_length: L, the number of positions that this computation will ever see; only `dynamic` depends on it.
        device: where to form them.

    Returns:
        `[r/2]` float32 frequencies (radians per position) and the factor on cos and sin.

    Raises:
        ConfigError: for r = 2 with `dynamic`, whose exponent divides by zero.
    """
    kind = parameters.get("rope_type", "default")
    theta = float(parameters.get("rope_theta", 10000.0))
    factor = float(parameters.get("factor", 1.0))
    # As in transformers, dynamic NTK stretches relative to the model's own length.
    original = None if kind == "dynamic" else parameters.get("original_max_position_embeddings")
    trained = int(original or max_position_embeddings)
    if kind == "dynamic" and context_length > trained:
        if rotary_dim <= 2:
            raise ConfigError("Dynamic NTK needs at least 4 rotary channels a head; use rope_type 'linear' or 'yarn'.")
        theta *= (factor * context_length / trained - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    frequencies = theta**-exponents
    if kind == "linear":
        frequencies = frequencies / factor
    if kind == "llama3":
        low, high = (
            float(parameters.get(name, usual)) for name, usual in (("low_freq_factor", 1), ("high_freq_factor", 4))
        )
        fast = ((trained * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (fast + (1 - fast) / factor)
    if kind != "yarn":
        return frequencies.float(), 1.0

    def pair_turning(turns: float) -> float:
        """The (fractional) pair index whose angle passes `turns` full turns over the trained length."""
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(parameters.get("beta_fast") or 32.0), pair_turning(parameters.get("beta_slow") or 1.0)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float64, device=device)
    slow = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
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


# Products of a query and a key stay finite in float32 below e^88.
_LARGEST_EXPONENT = 85.0
# −ln ζ_0 with ζ_0 = 2/7, which decays fastest.
_STEEPEST = math.log(3.5)


def xpos_scales(head_dim: int) -> Tensor:
    """ζ_j = (2j + 0.4 K) / (1.4 K), the decay of each channel pair per `scale_base` tokens.

    Args:
        head_dim: K, even.

    Returns:
        `[K/2]` float64, rising from 0.286 towards 1.
    """
    return (torch.arange(0, head_dim, 2, dtype=torch.float64) + 0.4 * head_dim) / (1.4 * head_dim)


def xpos_reach(scale_base: float) -> float:
    """The widest span of positions that can share one centre with this `scale_base`."""
    return _LARGEST_EXPONENT * scale_base / _STEEPEST


def xpos_rates(head_dim: int, scale_base: float, reach: int = 0) -> tuple[Tensor, Tensor]:
    """What xPos does to a channel pair per position: angle 10000^(−2j/K) and log-growth ln(ζ_j) / `scale_base`.

    Args:
        head_dim: K, even.
        scale_base: tokens over which pair j decays by ζ_j; 512 in the source.
        reach: widest span of positions that share one centre (a segment); checked for overflow.

    Returns:
        frequencies and growth, `[K/2]` float64, as `dilated_attention` takes them.

    Raises:
        ConfigError: when a span of `reach` positions would leave the range of float32.

    Source: Sun et al. 2022, arXiv 2212.10554; microsoft/torchscale: torchscale/component/xpos_relative_position.py.
    """
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if reach > xpos_reach(scale_base):
        raise ConfigError(
            f"xPos over segments of {reach} tokens overflows float32 with xpos_scale_base={scale_base:g}; use at least "
            f"{math.ceil(reach * _STEEPEST / _LARGEST_EXPONENT)}, or shorter segments."
        )
    return frequencies, xpos_scales(head_dim).log() / scale_base


def apply_xpos(
    x: Tensor, positions: Tensor, scale_base: float = 512.0, *, key: bool = False, centre: float = 0.0
) -> Tensor:
    """xPos: rotates channel pairs (2j, 2j + 1) and scales them by ζ_j^{±(p − centre)/scale_base}, − for keys.

    Scores depend on the distance of query and key alone, whatever the centre; one near the positions keeps them finite.

    Args:
        x: `[B, T, H, K]`.
        positions: `[B, T]`.
        scale_base: tokens over which pair j decays by ζ_j.
        key: whether x are keys.
        centre: the position with scale 1; the source takes ⌈P/2⌉ of P positions.

    Returns:
        `[B, T, H, K]` float32 (float64 for float64 input).

    Source: as `xpos_rates`.
    """
    frequencies, growth = (rate.to(x.device) for rate in xpos_rates(x.shape[-1], scale_base))
    turned = rotation_table(positions, frequencies, torch.zeros_like(growth))
    scaled = rotation_table(positions - centre, torch.zeros_like(growth), growth, key=key)
    return rotate(x, (turned * scaled).unsqueeze(2))


def alibi_slopes(heads: int) -> Tensor:
    """2^(−8(j + 1)/H) for head j, `[H]` float32.

    Source: Press et al. 2022, arXiv 2108.12409.
    """
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


def alibi_bias(heads: int, reach: int) -> Tensor:
    """ALiBi by distance d = key − query: −slope_h·|d|.

    Args:
        heads: H.
        reach: M, number of distances on either side, 0 included.

    Returns:
        `[H, 2M − 1]` float32, distance d at index M − 1 + d.
    """
    return -alibi_slopes(heads).unsqueeze(1) * torch.arange(1 - reach, reach).abs()


def relative_position_bucket(
    relative: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """T5's bucket of a distance: the first half of the buckets holds one distance each, the rest grows logarithmically.

    With n = −relative (bidirectional: |n|, keys ahead of the query in the second half of the buckets; otherwise keys
    ahead count as n = 0) and e half of the buckets of one direction: n for n < e, else
    e + ⌊ln(n/e) / ln(max_distance/e) · (buckets − e)⌋, at most buckets − 1.

    Args:
        relative: integer tensor, key position − query position.
        num_buckets: of both directions together.
        max_distance: from here on all distances share the last bucket.
        bidirectional: whether keys ahead of the query have buckets of their own.

    Returns:
        int64 tensor of the same shape.

    Source: Raffel et al. 2020, arXiv 1910.10683; microsoft/torchscale: component/relative_position_bias.py.
    """
    behind, ahead = -relative, torch.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        ahead = (behind < 0).long() * num_buckets
        behind = behind.abs()
    else:
        behind = behind.clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(behind.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return ahead + torch.where(behind < exact, behind, far)


def relative_position_bias(weight: Tensor, reach: int, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """T5's learnt bias by distance d = key − query: weight[bucket(d), h].

    Args:
        weight: `[num_buckets, H]`.
        reach: M, number of distances on either side, 0 included.
        max_distance, bidirectional: as `relative_position_bucket`.

    Returns:
        `[H, 2M − 1]` in weight's dtype, distance d at index M − 1 + d; differentiable.
    """
    distances = torch.arange(1 - reach, reach, device=weight.device)
    return weight[relative_position_bucket(distances, weight.shape[0], max_distance, bidirectional)].T
