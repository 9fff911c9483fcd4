"""Cosine attention (Cottention): linear attention by the cosine of query and key."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError, nearest
from farspan.mixers.base import MixerShape, StateMixer, linear_flops, takes_step
from farspan.mixers.cache import LayerCache, StateCache
from farspan.mixers.layout import SequenceLayout
from farspan.nn.joint import Joint
from farspan.nn.positions import apply_rotary
from farspan.ops.cosine.api import NORM_POSITIONS, cosine_attention
from farspan.ops.cosine.step import cosine_step


@dataclass
class CosineOptions:
    """Options of the `cosine` mixer.

    The released GPT has RoPE on interleaved pairs and no biases; the released BERT has biases and no RoPE.

    Attributes:
        attention_bias: whether the four projections have biases (released: BERT yes, GPT no).
        rope: whether queries and keys are rotated by position before they are normalised.
        partial_rotary_factor: share of a head's channels that is rotated.
        rope_interleaved: True rotates channels (2j, 2j + 1), as the released GPT; False (j, j + r/2).
        norm_position: when causal, whose count divides a value: `"value"` its own place's (released), `"query"` the
            reader's.
        norm_init: initial logit of the exponent of the count, for every head.
        norm_eps: least norm that queries and keys are divided by.
    """

    attention_bias: bool = False
    rope: bool = True
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    norm_position: str = "value"
    norm_init: float = 0.5
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if not 0 < self.partial_rotary_factor <= 1:
            raise ConfigError(f"partial_rotary_factor={self.partial_rotary_factor} must lie in (0, 1].")
        if self.norm_position not in NORM_POSITIONS:
            raise ConfigError(
                f"Unknown norm_position {self.norm_position!r}: {nearest(self.norm_position, NORM_POSITIONS)}"
            )
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps={self.norm_eps} must be positive; the released value is 1e-12.")


class CosineMixer(StateMixer):
    """Cosine attention, with N(x) = x / max(‖x‖, eps), RoPE R and c_s the number of tokens up to s:

        q = R(x W_q),  k = R(x W_k),  v = x W_v
        S_t = S_{t−1} + N(k_t)ᵀ v_t / c_t^σ(p_h);  o_t = N(q_t) S_t;  y = o W_o

    with one learned p per head. Bidirectional, every token reads the sum over all n tokens, divided by n^σ(p_h).

    Cost: O(T) time; a constant cache of H·K² float32 numbers and one count.
    Source: Mongaras et al. 2024, arXiv 2409.18747; gmongaras/Cottention_Transformer.
    """

    bidirectional: ClassVar[bool] = True
    compact_cache: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = ("cosine_attention", "cosine_step")
    joint_projections = ("q_proj", "k_proj", "v_proj")
    joint: Joint | None = None

    def __init__(self, config: MixerShape, options: CosineOptions, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.options = options
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.causal = config.causal
        self.rope_parameters = config.rope_parameters
        self.max_position_embeddings = config.max_position_embeddings
        self.rotary_dim = round(self.head_dim * options.partial_rotary_factor)
        if options.rope and (self.rotary_dim % 2 or self.rotary_dim == 0):
            raise ConfigError(
                f"cosine: RoPE rotates pairs of channels, but {self.rotary_dim} of head_dim={self.head_dim} would be "
                "rotated; change mixer_options.cosine.partial_rotary_factor, or set rope to false."
            )
        inner, bias = self.heads * self.head_dim, options.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.length_exponent = nn.Parameter(torch.empty(self.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.length_exponent, self.options.norm_init)

    def forward(
        self,
        x: Tensor,
        *,
        layout: SequenceLayout,
        cache: LayerCache | None = None,
        sequence_parallel: Any = None,
    ) -> Tensor:
        assert cache is None or isinstance(cache, StateCache)
        if cache is not None and takes_step(x, layout, cache):
            return self._step(x, layout, cache)
        q, k, v = (
            project(x).unflatten(-1, (self.heads, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.options.rope:
            cos, sin = layout.rotary(self.rotary_dim, self.rope_parameters, self.max_position_embeddings)
            q, k = (apply_rotary(z, cos, sin, self.options.rope_interleaved) for z in (q, k))
        count = cache.get("count") if cache else None
        # Without a decay, a padded token needs no packing: it is not counted and writes nothing.
        out, state = cosine_attention(
            q,
            k,
            v,
            self.length_exponent,
            causal=self.causal,
            norm_position=self.options.norm_position,
            eps=self.options.norm_eps,
            padding_mask=layout.padding_mask,
            initial_state=cache.get("recurrent") if cache else None,
            initial_count=count,
            output_final_state=cache is not None,
            cu_seqlens=layout.cu_seqlens,
        )
        if cache is not None:
            lengths = layout.lengths()
            cache.update(recurrent=state, count=lengths if count is None else count + lengths)
        return self.o_proj(out.flatten(2))

    def _step(self, x: Tensor, layout: SequenceLayout, cache: StateCache) -> Tensor:
        """One token per row: the same formulas, state and count updated in place."""
        if self.joint is None:
            projected = tuple(getattr(self, name)(x) for name in self.joint_projections)
        else:
            projected = self.joint(x)
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)) for part in projected)
        cos = sin = None
        if self.options.rope:
            cos, sin = layout.rotary(self.rotary_dim, self.rope_parameters, self.max_position_embeddings)
        out = cosine_step(
            q,
            k,
            v,
            self.length_exponent,
            cache.tensors["recurrent"],
            cache.tensors["count"],
            cos=cos,
            sin=sin,
            rope_interleaved=self.options.rope_interleaved,
            norm_position=self.options.norm_position,
            eps=self.options.norm_eps,
        )
        return self.o_proj(out.flatten(2))

    def flops_per_token(self, length: int) -> float:
        # k_tᵀ v_t into the state and q_t S_t out of it; all pairs where a bidirectional sequence is short.
        recurrence = 4.0 * self.heads * self.head_dim**2
        pairs = 4.0 * self.heads * self.head_dim * length
        mixing = recurrence if self.causal else min(recurrence, pairs)
        return linear_flops(self.q_proj, self.k_proj, self.v_proj, self.o_proj) + mixing

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        count = torch.long.itemsize
        return max(torch.float32.itemsize, dtype.itemsize) * self.heads * self.head_dim**2 + count
