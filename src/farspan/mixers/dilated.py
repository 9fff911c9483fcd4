"""Dilated attention (LongNet): one softmax over the keys of several (segment, dilation) patterns."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError, ShapeError, nearest
from farspan.mixers.base import CacheKind, Mixer, MixerShape, linear_flops
from farspan.mixers.cache import LayerCache
from farspan.mixers.dilated_cache import DilatedCache
from farspan.mixers.layout import SequenceLayout
from farspan.nn.joint import Joint, projected
from farspan.nn.norms import make_norm
from farspan.nn.positions import alibi_bias, relative_position_bias, xpos_rates, xpos_reach
from farspan.ops._contract import compute_dtype
from farspan.ops.dilated.api import check_patterns, dilated_attention
from farspan.ops.dilated.live import LivePattern, live_patterns
from farspan.ops.dilated.patterns import OFFSET_RULES, PAD_MODES, DilatedSettings, score_entries
from farspan.ops.dilated.rotation import turn_factors, turn_pair
from farspan.ops.rotary import rotary_pair

ROTATIONS = ("rope", "xpos")
BIASES = ("alibi", "relative_bias")


@dataclass
class DilatedOptions:
    """Options of the `dilated` mixer; the defaults are the paper's patterns.

    Attributes:
        segment_lengths: w per pattern; any numbers, also beyond the text.
        dilations: r per pattern: of each segment a head keeps every r-th row.
        head_offset: first row of head j: `"mod"` is j mod r (paper), `"block"` ⌊j / ⌈H/r⌉⌋ (torchscale), `"none"` 0.
        detach_mixture_weights: True treats the weights between patterns as constants in backward (torchscale).
        pad_mode: `"mask"`, or `"zero_keys"` to fill ragged segments with keys of score 0 (torchscale, for its weights).
        positions: `"none"`, `"rope"`, `"xpos"`, `"alibi"`, `"relative_bias"`, or a rotation and a bias joined by `+`.
        xpos_scale_base: tokens over which xPos decays; wide segments need a large one.
        relative_bias_buckets: number of T5 buckets.
        relative_bias_max_distance: from this distance on keys share the last bucket.
        relative_bias_bidirectional: whether keys ahead have buckets of their own; None is when not causal.
        qk_norm: name of a normalisation per head on queries and keys, before positions; None is none.
        multi_query: whether all heads share one key-value head, whatever `num_key_value_heads` says.
        attention_dropout: probability of dropping an attention weight in training.
        attention_bias: whether the four projections have biases (torchscale: yes).
        sub_norm: whether a LayerNorm stands before the output projection (torchscale's sub-LN).
        norm_eps: epsilon of these normalisations.
    """

    segment_lengths: list[int] = field(default_factory=lambda: [2048, 4096, 8192, 16384, 32768])
    dilations: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 12])
    head_offset: str = "mod"
    detach_mixture_weights: bool = False
    pad_mode: str = "mask"
    positions: str = "rope"
    xpos_scale_base: float = 512.0
    relative_bias_buckets: int = 32
    relative_bias_max_distance: int = 128
    relative_bias_bidirectional: bool | None = None
    qk_norm: str | None = None
    multi_query: bool = False
    attention_dropout: float = 0.0
    attention_bias: bool = False
    sub_norm: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_patterns(self.segment_lengths, self.dilations)
        for name, value, accepted in (
            ("head_offset", self.head_offset, OFFSET_RULES),
            ("pad_mode", self.pad_mode, PAD_MODES),
        ):
            if value not in accepted:
                raise ConfigError(f"Unknown {name} {value!r}: {nearest(str(value), accepted)}")
        parts = self.position_parts()
        for part in parts:
            if part not in ROTATIONS + BIASES:
                raise ConfigError(f"Unknown positions {part!r}: {nearest(part, ('none', *ROTATIONS, *BIASES))}")
        if len(set(parts) & set(ROTATIONS)) > 1 or len(set(parts) & set(BIASES)) > 1 or len(set(parts)) < len(parts):
            raise ConfigError(
                f"positions={self.positions!r}: join at most one of {', '.join(ROTATIONS)} and one of "
                f"{', '.join(BIASES)}."
            )
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"attention_dropout={self.attention_dropout} must lie in [0, 1).")
        if self.xpos_scale_base <= 0:
            raise ConfigError(f"xpos_scale_base={self.xpos_scale_base} must be positive; the source has 512.")
        if self.relative_bias_buckets < 4 or self.relative_bias_max_distance <= self.relative_bias_buckets // 2:
            raise ConfigError(
                f"relative_bias_buckets={self.relative_bias_buckets} must be at least 4, and "
                f"relative_bias_max_distance={self.relative_bias_max_distance} more than half of it."
            )
        if self.qk_norm is not None:
            make_norm(self.qk_norm, 1, self.norm_eps)

    def position_parts(self) -> list[str]:
        """The rotation and the bias that `positions` names."""
        return [] if self.positions == "none" else self.positions.split("+")


class DilatedMixer(Mixer):
    """y = dilated_attention(q, k, v) W_o with q, k, v linear in x, and positions by choice.

    Segments count the real tokens of each document from 0: padding takes no place, and packed documents start anew.

    Cost: O(T·Σ w/r²) time; a cache of at most Σ ⌈w/r⌉ keys and values per head, since a key dies with its segment.
    Source: Ding et al. 2023, arXiv 2307.02486; microsoft/torchscale: torchscale/component/dilated_attention.py.
    """

    bidirectional: ClassVar[bool] = True
    attention_weights: ClassVar[bool] = True
    compact_cache: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = ("dilated_attention", "dilated_attention_step", "rotary_pair", "turn_pair")
    joint_projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    joint: Joint | None = None
    no_weight_decay = ("relative_bias",)

    def __init__(self, config: MixerShape, options: DilatedOptions, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.options = options
        self.heads = config.num_attention_heads
        self.key_heads = 1 if options.multi_query else config.num_key_value_heads
        self.head_dim = config.head_dim
        self.causal = config.causal
        self.rope_parameters = config.rope_parameters
        self.max_position_embeddings = config.max_position_embeddings
        self.position_parts = options.position_parts()
        if set(self.position_parts) & set(ROTATIONS) and self.head_dim % 2:
            raise ConfigError(
                f"dilated: positions={options.positions!r} turns pairs of channels, but head_dim={self.head_dim} is "
                "odd; choose an even one or another kind of positions."
            )
        width, bias = self.heads * self.head_dim, options.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.key_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        norm = options.qk_norm
        self.q_norm = nn.Identity() if norm is None else make_norm(norm, self.head_dim, options.norm_eps)
        self.k_norm = nn.Identity() if norm is None else make_norm(norm, self.head_dim, options.norm_eps)
        self.sub_norm = nn.LayerNorm(width, eps=options.norm_eps) if options.sub_norm else nn.Identity()
        learnt = (
            torch.zeros(options.relative_bias_buckets, self.heads) if "relative_bias" in self.position_parts else None
        )
        self.relative_bias = nn.Parameter(learnt) if learnt is not None else None

    def reset_parameters(self) -> None:
        if self.relative_bias is not None:
            nn.init.zeros_(self.relative_bias)

    @staticmethod
    def cache_kind(options: Any) -> CacheKind:
        return "window"

    def forward(
        self,
        x: Tensor,
        *,
        layout: SequenceLayout,
        cache: LayerCache | None = None,
        sequence_parallel: Any = None,
    ) -> Tensor:
        parts, heads = projected(self, x), (self.heads, self.key_heads, self.key_heads)
        q, k, v = (part.unflatten(-1, (count, self.head_dim)) for part, count in zip(parts, heads, strict=True))
        q, k = self.q_norm(q), self.k_norm(k)
        cos = sin = None
        if "rope" in self.position_parts:
            cos, sin = layout.rotary(self.head_dim, self.rope_parameters, self.max_position_embeddings)
        assert cache is None or isinstance(cache, DilatedCache)
        past, ahead = 0 if cache is None else cache.length, self._turns_ahead(q.dtype)
        if cache is not None:
            ahead = cache.turned(ahead)
        if ahead:
            q, k = (x.float() if x.dtype == torch.float16 else x for x in (q, k))  # which growth would leave
            q, k = turn_pair(q, k, *self._turns(layout, cache, compute_dtype(q)))
        form = partial(self._settings, past + x.shape[1], x.device, ahead)
        settings = form() if cache is None else cache.settings(form)
        if cache is not None and cache.takes_step(x, layout):
            return self.o_proj(self.sub_norm(cache.step(q, k, v, settings, cos, sin).flatten(2)))
        if cos is not None and sin is not None:
            q, k = rotary_pair(q, k, cos, sin)

        def attend(values: Tensor) -> Tensor:
            packed = dilated_attention(
                layout.pack(q),
                layout.pack(k),
                layout.pack(values),
                segment_lengths=self.options.segment_lengths,
                dilations=self.options.dilations,
                head_offset=self.options.head_offset,
                causal=self.causal,
                distance_bias=settings.distance_bias,
                frequencies=settings.frequencies,
                growth=settings.growth,
                dropout=self.options.attention_dropout if self.training else 0.0,
                detach_mixture_weights=self.options.detach_mixture_weights,
                pad_mode=self.options.pad_mode,
                cu_seqlens=layout.sequences(),
            )
            return layout.unpack(packed)

        if past and cache is not None and x.shape[1]:
            out = cache.attend(q, k, v, layout.padding_mask, settings)
        else:
            out = layout.observed(attend, v)
            if cache is not None and x.shape[1]:
                cache.write(k, v, layout.padding_mask)
        return self.o_proj(self.sub_norm(out.flatten(2)))

    def _turns_ahead(self, dtype: torch.dtype) -> bool:
        """Whether xPos turns queries and keys, also of the memory, before the patterns part: once for all of them."""
        segments, widest = self.options.segment_lengths, max(self.options.segment_lengths)
        nested = not any(widest % segment for segment in segments) and widest <= xpos_reach(
            self.options.xpos_scale_base
        )
        return "xpos" in self.position_parts and nested and dtype != torch.float16

    def _turns(self, layout: SequenceLayout, cache: DilatedCache | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For `turn_pair`: positions count from the middle of the longest segments; formed once for all layers."""
        window, base = max(self.options.segment_lengths), self.options.xpos_scale_base

        def compute() -> tuple[Tensor, Tensor]:
            places = layout.places() if cache is None else layout.places() + cache.seen()
            return turn_factors(places, window, *_rates(self.head_dim, base, places.device), dtype)

        return layout.once(("xpos", window, base, self.head_dim, dtype), compute)

    def _settings(self, length: int, device: torch.device, ahead: bool) -> DilatedSettings:
        """The settings for a text of this length: rotations that stay finite, a bias that reaches far enough."""
        options = self.options
        reach = max(1, min(max(options.segment_lengths), length))
        bias = frequencies = growth = None
        if "xpos" in self.position_parts and not ahead:
            rates = xpos_rates(self.head_dim, options.xpos_scale_base, reach)
            frequencies, growth = (rate.to(device) for rate in rates)
        if "alibi" in self.position_parts:
            bias = alibi_bias(self.heads, reach).to(device)
        if self.relative_bias is not None:
            chosen = options.relative_bias_bidirectional
            bias = relative_position_bias(
                self.relative_bias,
                reach,
                options.relative_bias_max_distance,
                bidirectional=not self.causal if chosen is None else chosen,
            )
        return DilatedSettings(
            patterns=check_patterns(options.segment_lengths, options.dilations),
            head_offset=options.head_offset,
            causal=self.causal,
            scale=self.head_dim**-0.5,
            zero_keys=options.pad_mode == "zero_keys",
            distance_bias=bias,
            frequencies=frequencies,
            growth=growth,
        )

    def new_cache(self) -> LayerCache:
        return DilatedCache(self._live_patterns())

    def _live_patterns(self) -> list[LivePattern]:
        patterns = check_patterns(self.options.segment_lengths, self.options.dilations)
        return live_patterns(DilatedSettings(patterns, self.options.head_offset), self.heads, self.key_heads)

    def flops_per_token(self, length: int) -> float:
        patterns = check_patterns(self.options.segment_lengths, self.options.dilations)
        settings = DilatedSettings(patterns, self.options.head_offset, self.causal)
        scores_and_values = 4.0 * self.head_dim * score_entries(settings, self.heads, length) / length
        return linear_flops(self.q_proj, self.k_proj, self.v_proj, self.o_proj) + scores_and_values

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        rows = sum(pattern.rows(length) for pattern in self._live_patterns())
        return 2 * rows * self.key_heads * self.head_dim * dtype.itemsize + torch.int64.itemsize


def _rates(head_dim: int, scale_base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """xPos' rates on the device, sent there once: a graph that is being captured takes no copies from the host."""
    if torch.compiler.is_compiling():
        frequencies, growth = xpos_rates(head_dim, scale_base)
        return frequencies.to(device), growth.to(device)
    return _sent_rates(head_dim, scale_base, device)


@functools.lru_cache(maxsize=16)
def _sent_rates(head_dim: int, scale_base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        frequencies, growth = xpos_rates(head_dim, scale_base)
        return frequencies.to(device), growth.to(device)


@dataclass
class _Shape:
    """The fields of `MixerShape` for a layer outside a model."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    causal: bool
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] = field(default_factory=dict)


class DilatedAttention(nn.Module):
    """Dilated self-attention as a layer of its own: projections, heads, attention over the patterns, output projection.

    Positions that no pattern selects for any head give the output projection's bias.

    Args:
        d_model: width D of input and output.
        num_heads: H; each head has D/H channels.
        dilation_rate: r, or a list of them: a mixture of patterns.
        segment_size: w, or a list of the same length.
        dropout: probability of dropping an attention weight in training.
        causal: whether a token sees only its past.
        use_xpos: whether queries and keys are turned by xPos.
        use_rel_pos_bias: whether T5's relative bias is added to the scores.
        use_alibi: whether ALiBi is added to the scores, instead of the relative bias.
        qk_norm: name of a normalisation per head on queries and keys, or None.
        head_offset: see `DilatedOptions`.

    Raises:
        ConfigError: for sizes that do not fit or options that are not accepted.

    Note:
        The published layer of this name returns fewer rows than it gets and does not split heads; here the output has
        the shape of the input, for any length, and masks and biases act on the scores.

    Source: kyegomez/LongNet: README.

    Example:
        >>> layer = DilatedAttention(d_model=64, num_heads=4, dilation_rate=[1, 2], segment_size=[8, 16], causal=True)
        >>> layer(torch.randn(2, 21, 64)).shape
        torch.Size([2, 21, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dilation_rate: int | Sequence[int],
        segment_size: int | Sequence[int],
        dropout: float = 0.0,
        causal: bool = False,
        use_xpos: bool = False,
        use_rel_pos_bias: bool = False,
        *,
        use_alibi: bool = False,
        qk_norm: str | None = None,
        head_offset: str = "mod",
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ConfigError(f"d_model={d_model} is not divisible by num_heads={num_heads}; choose a divisor.")
        chosen = {"xpos": use_xpos, "relative_bias": use_rel_pos_bias, "alibi": use_alibi}
        options = DilatedOptions(
            segment_lengths=[segment_size] if isinstance(segment_size, int) else list(segment_size),
            dilations=[dilation_rate] if isinstance(dilation_rate, int) else list(dilation_rate),
            head_offset=head_offset,
            positions="+".join(name for name, wanted in chosen.items() if wanted) or "none",
            qk_norm=qk_norm,
            attention_dropout=dropout,
            attention_bias=True,
        )
        self.mixer = DilatedMixer(_Shape(d_model, num_heads, num_heads, d_model // num_heads, causal), options, 0)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attends over `[B, T, D]`; returns `[B, T, D]`.

        Args:
            x: `[B, T, D]`, any T.
            padding_mask: `[B, T]` bool, True for real tokens; None when all are.
        """
        width = self.mixer.q_proj.in_features
        if x.dim() != 3 or x.shape[-1] != width:
            raise ShapeError(f"DilatedAttention: x has shape {list(x.shape)}; expected [B, T, D={width}].")
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return self.mixer(x, layout=SequenceLayout(positions, None if padding_mask is None else padding_mask.bool()))
