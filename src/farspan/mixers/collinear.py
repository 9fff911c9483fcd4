"""Collinear constrained attention (CoCA): softmax attention whose keys are the query itself, scaled by position."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError, nearest
from farspan.mixers.base import CacheKind, Mixer, MixerShape, linear_flops, mean_keys_seen
from farspan.mixers.cache import KeyValueCache, LayerCache
from farspan.mixers.layout import SequenceLayout
from farspan.nn.joint import Joint, projected
from farspan.ops.collinear.api import FORMS, TIES, collinear_attention, collinear_coefficients
from farspan.ops.collinear.step import collinear_attention_step


@dataclass
class CollinearOptions:
    """Options of the `collinear` mixer.

    Attributes:
        form: `slack` is the released form and that of the paper's headline tables; `strict` is the paper's equation 9,
            whose scores depend on distances alone.
        partial_rotary_factor: share of a head's channels that is rotated.
        tie: which channels share a coefficient. `rotary` ties the rotary pairs, and the halves of the channels that
            are not rotated; `head` ties the halves of the whole head, as the released GPT-NeoX code does. They differ
            where `partial_rotary_factor` is below 1.
        sliding_window: number of keys a query sees, itself included; None is all.
        attention_bias: whether the four projections have biases (GPT-NeoX: yes, LLaMA: no).
    """

    form: str = "slack"
    partial_rotary_factor: float = 1.0
    tie: str = "rotary"
    sliding_window: int | None = None
    attention_bias: bool = False

    def __post_init__(self) -> None:
        for name, accepted in (("form", FORMS), ("tie", TIES)):
            if getattr(self, name) not in accepted:
                value = getattr(self, name)
                raise ConfigError(f"Unknown {name} {value!r} of collinear: {nearest(str(value), accepted)}")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ConfigError(f"partial_rotary_factor={self.partial_rotary_factor} must lie in (0, 1].")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be at least 1, or null for full attention.")
        if self.form == "strict" and self.tie == "head" and self.partial_rotary_factor < 1:
            raise ConfigError(
                f"form='strict' needs tied rotary pairs, but tie='head' ties none of them with "
                f"partial_rotary_factor={self.partial_rotary_factor}; use tie='rotary' or form='slack'."
            )


class CollinearMixer(Mixer):
    """q = x W_Q, t = relu(mean of the tied channels of x W_T), v = x W_V, then `collinear_attention` and W_O.

    With RoPE R: o_m = Σ_n softmax_n(S(m, n) / √K) v_n, where S = ⟨R_m q_m, q_m ∘ R_n t_n⟩ (slack) or
    Σ_j t_nj |q_mj|² cos((m − n) θ_j) (strict). One call of softmax attention.

    Cost: O(T²) time, a cache of 3/2·G·K numbers per token: K/2 coefficients and K values per head.
    Source: Zhu et al. 2023, arXiv 2309.08646; codefuse-ai/Collinear-Constrained-Attention.
    """

    bidirectional: ClassVar[bool] = True
    attention_weights: ClassVar[bool] = True
    compact_cache: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = (
        "collinear_attention",
        "collinear_coefficients",
        "collinear_attention_step",
    )
    joint_projections: ClassVar[tuple[str, ...]] = ("q_proj", "t_proj", "v_proj")
    joint: Joint | None = None

    def __init__(self, config: MixerShape, options: CollinearOptions, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.options = options
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.causal = config.causal
        self.rope_parameters = config.rope_parameters
        self.max_position_embeddings = config.max_position_embeddings
        self.rotary_dim = int(self.head_dim * options.partial_rotary_factor)
        if self.head_dim % 2 or self.rotary_dim % 2 or self.rotary_dim == 0:
            raise ConfigError(
                f"collinear: head_dim={self.head_dim} and its {self.rotary_dim} rotated channels must both be even and "
                "positive, since channels are tied in pairs; change head_dim or partial_rotary_factor."
            )
        width, bias = config.hidden_size, options.attention_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.t_proj = nn.Linear(width, self.key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.key_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        layout: SequenceLayout,
        cache: LayerCache | None = None,
        sequence_parallel: Any = None,
    ) -> Tensor:
        parts, heads = projected(self, x), (self.heads, self.key_heads, self.key_heads)
        q, raw, v = (part.unflatten(-1, (count, self.head_dim)) for part, count in zip(parts, heads, strict=True))
        t = collinear_coefficients(raw, self.rotary_dim, tie=self.options.tie)
        if isinstance(cache, CoefficientCache) and cache.takes_step(x, layout):
            return self.o_proj(self._step(q, t, v, layout, cache).flatten(2))
        fresh, key_mask, positions = True, None, None
        if cache is not None and x.shape[1]:
            assert isinstance(cache, CoefficientCache)
            fresh = cache.length == 0
            coefficients, values, held, places = cache.append_at(t, v, layout)
            if not fresh:
                t, v, key_mask, positions = coefficients, values, held, places
        table = self._rotary(layout, positions)

        def attend(values: Tensor) -> Tensor:
            if not fresh:
                return self._attend(q, t, values, *table, key_mask=key_mask)
            # Without a past, padding and packing are one case: real tokens side by side, no T×T mask.
            packed = (layout.pack(part) for part in (q, t, values, *table))
            return layout.unpack(self._attend(*packed, cu_seqlens=layout.sequences()))

        return self.o_proj(layout.observed(attend, v).flatten(2))

    def _attend(self, q: Tensor, t: Tensor, v: Tensor, cos: Tensor, sin: Tensor, **visibility: Any) -> Tensor:
        options = self.options
        return collinear_attention(
            q,
            t,
            v,
            cos,
            sin,
            form=options.form,
            tie=options.tie,
            causal=self.causal,
            window=options.sliding_window,
            **visibility,
        )

    def _step(self, q: Tensor, t: Tensor, v: Tensor, layout: SequenceLayout, cache: "CoefficientCache") -> Tensor:
        """One token per row behind a pinned memory, `[B, 1, H, K]`."""
        frequencies, factor = layout.frequencies(self.rotary_dim, self.rope_parameters, self.max_position_embeddings)
        return collinear_attention_step(
            q,
            t,
            v,
            cache.ring(),
            layout.positions,
            frequencies,
            rotary_scale=factor,
            form=self.options.form,
            tie=self.options.tie,
        )

    def _rotary(self, layout: SequenceLayout, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The table of the new tokens or, given the positions of all keys, of those."""
        if positions is not None:
            keys = SequenceLayout(positions, context_length=layout.context_length)
            layout = layout.once(("collinear keys", self.options.sliding_window), lambda: keys)
        return layout.rotary(self.rotary_dim, self.rope_parameters, self.max_position_embeddings)

    @staticmethod
    def cache_kind(options: Any) -> CacheKind:
        return "kv" if options.sliding_window is None else "window"

    def new_cache(self) -> LayerCache:
        tied = self.options.tie == "rotary" or self.rotary_dim == self.head_dim
        return CoefficientCache(self.options.sliding_window, steps=tied)

    def flops_per_token(self, length: int) -> float:
        seen = mean_keys_seen(length, self.options.sliding_window, self.causal)
        scores_and_values = 4.0 * self.heads * self.head_dim * seen
        return linear_flops(self.q_proj, self.t_proj, self.v_proj, self.o_proj) + scores_and_values

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        kept = length if self.options.sliding_window is None else min(length, self.options.sliding_window - 1)
        # One int64 beside them: the next position.
        return kept * self.key_heads * (self.head_dim // 2 + self.head_dim) * dtype.itemsize + torch.int64.itemsize


class CoefficientCache(KeyValueCache):
    """Coefficients t and values of every token, or of the window's; keys are rotated when they are read.

    Positions take no memory per token while they count the real tokens of a row: `next` `[B]` is the position that
    follows the newest one, and the others are counted back from it. If they ever jump, they are stored from then on.

    Args:
        window: number of keys a query sees, itself included; None keeps all keys.
        steps: whether `collinear_attention_step` can serve; it also needs positions that count on.
    """

    def __init__(self, window: int | None = None, *, steps: bool = True) -> None:
        super().__init__(window)
        self._steps = steps

    @property
    def can_pin(self) -> bool:  # type: ignore[override]
        return self._steps and "positions" not in self.tensors

    def append_at(
        self, t: Tensor, values: Tensor, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Adds the tokens of `layout`; returns all that they may see, as `append` does, and where it stands.

        Args:
            t: `[B, T, G, K/2]` coefficients of the new tokens.
            values: `[B, T, G, V]`.
            layout: positions and padding of the new tokens.

        Returns:
            Coefficients, values, key mask (or None) and positions `[B, S]`; the new tokens are the last T.
        """
        new, mask = layout.positions, layout.padding_mask
        back = _real_tokens_from(mask, new)
        if "next" in self.tensors:
            following = self.tensors.pop("next") + back[:, :1]
        else:
            last = new + back
            following = (last if mask is None else last.masked_fill(~mask, 0)).amax(-1, keepdim=True)
        counts_on = following - back == new
        if mask is not None:
            counts_on = counts_on | ~mask
        jumps = not layout.once("positions count on", lambda: bool(counts_on.all()))
        if jumps and self.length and "positions" not in self.tensors:
            past = self.tensors["mask"][:, : self.length] if "mask" in self.tensors else None
            positions = following - back[:, :1] - _real_tokens_from(past, self.tensors["keys"][:, : self.length])
            self.tensors["positions"] = positions.to(torch.int32)
        stored = jumps or "positions" in self.tensors
        if stored:
            self.tensors["positions"] = self._write("positions", new.to(torch.int32))
            positions = self.tensors["positions"][:, : self.length + new.shape[1]]
        t, values, key_mask = self.append(t, values, mask)
        self.tensors["next"] = following
        if not stored:
            positions = following - _real_tokens_from(key_mask, t)
        return t, values, key_mask, positions

    def crop(self, tokens: int) -> None:
        removed: Tensor | int = tokens
        if "mask" in self.tensors:
            removed = self.tensors["mask"][:, max(0, self.length - tokens) : self.length].sum(-1, keepdim=True)
        super().crop(tokens)
        if "next" in self.tensors:
            self.tensors["next"] = self.tensors["next"] - removed


def _real_tokens_from(mask: Tensor | None, like: Tensor) -> Tensor:
    """The number of real tokens from each place of `like` `[B, S, …]` to the end, its own included: `[B, S]`."""
    if mask is None:
        return torch.arange(like.shape[1], 0, -1, device=like.device).expand(like.shape[:2])
    return mask.flip(-1).long().cumsum(-1).flip(-1)
