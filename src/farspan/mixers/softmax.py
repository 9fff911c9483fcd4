"""Softmax attention with rotary positions: the baseline mixer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError
from farspan.mixers.base import CacheKind, Mixer, MixerShape, linear_flops
from farspan.mixers.cache import KeyValueCache, LayerCache
from farspan.mixers.layout import SequenceLayout
from farspan.nn.joint import Joint, projected
from farspan.nn.norms import RMSNorm
from farspan.ops.rotary import rotary_pair
from farspan.ops.softmax.api import softmax_attention
from farspan.ops.softmax.step import softmax_attention_step


@dataclass
class SoftmaxOptions:
    """Options of the `softmax` mixer.

    Attributes:
        sliding_window: number of keys a query sees, itself included; None is all.
        attention_bias: whether the four projections have biases.
        rope: whether queries and keys are rotated by position; False leaves positions out.
        partial_rotary_factor: share of a head's channels that is rotated.
        rope_interleaved: True rotates channels (2j, 2j + 1), as GPT-J; False (j, j + r/2).
        qk_norm: whether an RMSNorm per head stands on queries and keys, before the rotation (Qwen3).
        attention_dropout: dropout of the attention weights in training.
        sub_norm: whether a LayerNorm stands before the output projection (sub-LN).
        norm_eps: epsilon of these norms.
    """

    sliding_window: int | None = None
    attention_bias: bool = False
    rope: bool = True
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    qk_norm: bool = False
    attention_dropout: float = 0.0
    sub_norm: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be at least 1, or null for full attention.")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ConfigError(f"partial_rotary_factor={self.partial_rotary_factor} must lie in (0, 1].")
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"attention_dropout={self.attention_dropout} must lie in [0, 1).")
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps={self.norm_eps} must be positive.")


@dataclass
class SlidingSoftmaxOptions(SoftmaxOptions):
    """Options of the `sliding_softmax` mixer: those of `softmax`, with a window.

    A name of its own lets one stack have layers with a window beside layers without one.
    """

    sliding_window: int | None = 4096


class SoftmaxMixer(Mixer):
    """o = softmax(R(q) R(k)ᵀ K^−½) v with grouped key-value heads and RoPE R, then an output projection.

    The options add norms of q and k, leave the rotation out or change its pairs.

    Cost: O(T²) time, a cache of 2·G·K numbers per token (the last `sliding_window` tokens with a window).
    """

    bidirectional: ClassVar[bool] = True
    attention_weights: ClassVar[bool] = True
    compact_cache: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = ("softmax_attention", "softmax_attention_step", "rotary_pair")
    joint_projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    joint: Joint | None = None

    def __init__(self, config: MixerShape, options: SoftmaxOptions, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.options = options
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.causal = config.causal
        self.rope_parameters = config.rope_parameters
        self.max_position_embeddings = config.max_position_embeddings
        self.rotary_dim = int(self.head_dim * options.partial_rotary_factor)
        if options.rope and (self.rotary_dim % 2 or self.rotary_dim == 0):
            raise ConfigError(
                f"RoPE rotates pairs of channels, but {self.rotary_dim} of head_dim={self.head_dim} channels would be "
                "rotated; choose an even number or set mixer_options.softmax.rope to false."
            )
        bias = options.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.key_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, options.norm_eps) if options.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, options.norm_eps) if options.qk_norm else nn.Identity()
        width = self.heads * self.head_dim
        self.sub_norm = nn.LayerNorm(width, eps=options.norm_eps) if options.sub_norm else nn.Identity()

    @staticmethod
    def cache_kind(options: Any) -> CacheKind:
        return "kv" if options.sliding_window is None else "window"

    def forward(
        self,
        x: Tensor,
        *,
        layout: SequenceLayout,
        cache: LayerCache | None = None,
        sequence_parallel: Any = None,
    ) -> Tensor:
        parts = projected(self, x)
        heads = (self.heads, self.key_heads, self.key_heads)
        q, k, v = (part.unflatten(-1, (count, self.head_dim)) for part, count in zip(parts, heads, strict=True))
        q, k = self.q_norm(q), self.k_norm(k)
        cos = sin = None
        if self.options.rope:
            cos, sin = layout.rotary(self.rotary_dim, self.rope_parameters, self.max_position_embeddings)
        interleaved = self.options.rope_interleaved
        assert cache is None or isinstance(cache, KeyValueCache)
        if cache is not None and cache.takes_step(x, layout):
            out = softmax_attention_step(q, k, v, cache.ring(), cos=cos, sin=sin, interleaved=interleaved)
            return self.o_proj(self.sub_norm(out.flatten(2)))
        if cos is not None and sin is not None:
            q, k = rotary_pair(q, k, cos, sin, interleaved=interleaved)
        window = self.options.sliding_window
        dropout = self.options.attention_dropout if self.training else 0.0
        fresh, key_mask = True, None
        if cache is not None:
            fresh = cache.length == 0
            keys, values, held = cache.append(k, v, layout.padding_mask)
            if not fresh:
                k, v, key_mask = keys, values, held
        settings: dict[str, Any] = {"causal": self.causal, "window": window, "dropout": dropout}

        def attend(values: Tensor) -> Tensor:
            if not fresh:
                return softmax_attention(q, k, values, key_mask=key_mask, **settings)
            # Without a past, padding and packing are one case: real tokens side by side, no T×T mask.
            packed = (layout.pack(part) for part in (q, k, values))
            return layout.unpack(softmax_attention(*packed, cu_seqlens=layout.sequences(), **settings))

        out = layout.observed(attend, v)
        return self.o_proj(self.sub_norm(out.flatten(2)))

    def new_cache(self) -> LayerCache:
        return KeyValueCache(self.options.sliding_window)

    def flops_per_token(self, length: int) -> float:
        window = min(self.options.sliding_window or length, length)
        # Row t sees min(t, window) keys: the mean over t = 1 … length.
        seen = (window * (window + 1) / 2 + (length - window) * window) / length if self.causal else float(window)
        scores_and_values = 4.0 * self.heads * self.head_dim * seen
        return linear_flops(self.q_proj, self.k_proj, self.v_proj, self.o_proj) + scores_and_values

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        kept = length if self.options.sliding_window is None else min(length, self.options.sliding_window - 1)
        return 2 * kept * self.key_heads * self.head_dim * dtype.itemsize
