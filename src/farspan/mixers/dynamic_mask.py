"""Dynamic mask attention (Doge): a learned bias per key, formed from its value, and a selection of keys by it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from farspan.errors import ConfigError, nearest
from farspan.mixers.base import CacheKind, Mixer, MixerShape, linear_flops, mean_keys_seen
from farspan.mixers.cache import LayerCache
from farspan.mixers.layout import SequenceLayout
from farspan.mixers.live_cache import BiasedKeyCache, LiveKeyCache, UnreturningCache, hidden
from farspan.nn.joint import Joint, projected
from farspan.nn.norms import RMSNorm
from farspan.nn.plain import is_plain
from farspan.ops._contract import compute_dtype, without_autocast
from farspan.ops.dynamic_mask.api import SELECTIONS, dynamic_mask_attention
from farspan.ops.dynamic_mask.scores import LARGEST_EXPONENT, dynamic_mask_scores
from farspan.ops.dynamic_mask.step import dynamic_mask_step
from farspan.ops.rotary import rotary_pair


@dataclass
class DynamicMaskOptions:
    """Options of the `dynamic_mask` mixer; the defaults are those of Doge in transformers.

    Attributes:
        bias_form: `exp`, b = exp(A·softplus(z)); `linear`, b = A·softplus(z), the authors' newest form; `none`, no bias
            and no selection (`is_causal` of the first released model).
        bias_heads: `kv`, one bias per key-value head; `query`, one per query head (the older checkpoints).
        qk_norm: whether queries and keys pass an RMSNorm over the head's channels before the rotation.
        select: `topk_causal`, each query keeps its `keep_window_size` best visible keys; `topk_global`, the best of the
            whole sequence, whatever the query; `relu`, the keys with a positive bias; `none`, all keys.
        keep_window_size: w of the two top-k selections.
        smoothing_block: keys per block that are kept or dropped together; None is no smoothing.
        sliding_window: number of keys a query sees before the selection, itself included; None is all.
        attention_bias: whether the five projections have biases.
        rope: whether queries and keys are rotated by position.
        bias_init: A at initialisation: 0, plain attention at first (Doge), or 1 (the seed's module, Cheems).
        norm_eps: epsilon of the norms of queries and keys.
        padding_attends: as released: padded rows attend, too, to the real keys that they see, or to all values alike
            where they see none. It changes real tokens only where a feed-forward mixes tokens (`token_mixing`); False
            gives 0 at padding.
        unused_bias: with `bias_form='none'`, whether the parameters of the bias are held all the same, as in the first
            released model; they take part in nothing but the way back.
    """

    bias_form: str = "exp"
    bias_heads: str = "kv"
    qk_norm: bool = True
    select: str = "topk_causal"
    keep_window_size: int = 2048
    smoothing_block: int | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    rope: bool = True
    bias_init: float = 0.0
    norm_eps: float = 1e-6
    padding_attends: bool = False
    unused_bias: bool = False

    def __post_init__(self) -> None:
        for name, accepted in (
            ("bias_form", ("exp", "linear", "none")),
            ("bias_heads", ("kv", "query")),
            ("select", SELECTIONS),
        ):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"Unknown {name} {getattr(self, name)!r}: {nearest(getattr(self, name), accepted)}")
        if self.unused_bias and self.bias_form != "none":
            raise ConfigError(f"unused_bias=true needs bias_form='none'; bias_form={self.bias_form!r} uses the bias.")
        for name in ("keep_window_size", "smoothing_block", "sliding_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps={self.norm_eps} must be positive.")
        if self.smoothing_block is not None and self.selection == "none":
            raise ConfigError(
                f"smoothing_block={self.smoothing_block} smooths a selection, but select={self.select!r} with "
                f"bias_form={self.bias_form!r} makes none; set smoothing_block to null."
            )

    @property
    def selection(self) -> str:
        """What is selected by: `select`, or `none` without a bias."""
        return "none" if self.bias_form == "none" else self.select

    @property
    def looks_ahead(self) -> str | None:
        """The option that lets later tokens change earlier outputs; None if there is none."""
        if self.selection == "topk_global":
            return "select='topk_global'"
        return None if self.smoothing_block is None else f"smoothing_block={self.smoothing_block}"

    @property
    def evicts(self) -> bool:
        """Whether a key that one query does not select is never selected again."""
        return self.selection == "topk_causal" and self.sliding_window is None and self.smoothing_block is None


class DynamicMaskMixer(Mixer):
    """Softmax attention with a bias per key that is formed from the values, and a selection of keys by it:

        q = R(norm(x W_q)),  k = R(norm(x W_k)),  v = x W_v
        z_j = v_j W_z, v_j over all key-value heads;  b_j = exp(A · softplus(z_j)) or A · softplus(z_j)
        o_i = Σ_j softmax_j(q_i·k_j K^−½ + b_j) v_j over the selected keys j ≤ i;  y = o W_o

    Cost: O(T·w) time with `topk_causal`; its cache holds w live keys per bias head, whatever the length.
    Source: Shi et al., arXiv 2412.11834 and 2508.02124; transformers: models/doge; LoserCheems/WonderfulMatrices.
    """

    bidirectional: ClassVar[bool] = True
    attention_weights: ClassVar[bool] = True
    compact_cache: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = (
        "dynamic_mask_attention",
        "dynamic_mask_scores",
        "dynamic_mask_step",
        "normed_rotary_pair",
        "rotary_pair",
    )
    joint_projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    joint: Joint | None = None
    no_weight_decay = ("bias_scale",)

    def __init__(self, config: MixerShape, options: DynamicMaskOptions, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.options = options
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.causal = config.causal
        self.rope_parameters = config.rope_parameters
        self.max_position_embeddings = config.max_position_embeddings
        if options.rope and self.head_dim % 2:
            raise ConfigError(
                f"dynamic_mask: RoPE rotates pairs of channels, but head_dim={self.head_dim} is odd; choose an even "
                "number or set mixer_options.dynamic_mask.rope to false."
            )
        if options.padding_attends and not self.causal:
            raise ConfigError("dynamic_mask: padding_attends=true is a form of causal models; leave it out.")
        self.bias_heads = self.key_heads if options.bias_heads == "kv" else self.heads
        width, bias = config.hidden_size, options.attention_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.key_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, options.norm_eps) if options.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, options.norm_eps) if options.qk_norm else None
        biased = options.bias_form != "none" or options.unused_bias
        self.bias_proj = nn.Linear(self.key_heads * self.head_dim, self.bias_heads, bias=bias) if biased else None
        self.bias_scale = nn.Parameter(torch.empty(self.bias_heads)) if biased else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias_scale is not None:
            nn.init.constant_(self.bias_scale, self.options.bias_init)

    @staticmethod
    def cache_kind(options: Any) -> CacheKind:
        bounded = options.evicts or options.looks_ahead or options.sliding_window is not None
        return "window" if bounded else "kv"

    def forward(
        self,
        x: Tensor,
        *,
        layout: SequenceLayout,
        cache: LayerCache | None = None,
        sequence_parallel: Any = None,
    ) -> Tensor:
        if self.options.looks_ahead:
            layout = dataclasses.replace(layout, compact=False)
        if isinstance(cache, LiveKeyCache) and cache.takes_step(x.shape[1]):
            return self._step(x, layout, cache)
        q, k, v = self.project(x, layout)
        bias = self.key_bias(v)
        ranking = self.key_ranking(x, bias)
        if isinstance(cache, UnreturningCache):
            cache.begin()
        past = isinstance(cache, BiasedKeyCache | LiveKeyCache) and cache.length > 0
        select, key_mask, held = self.options.selection, None, (k, v, bias, ranking)
        if isinstance(cache, LiveKeyCache):
            held = cache.append(k, v, bias, ranking, layout.padding_mask)
        elif isinstance(cache, BiasedKeyCache):
            keys, values, key_mask, more = cache.append_with(k, v, layout.padding_mask, bias=bias, ranking=ranking)
            held = (keys, values, more["bias"], more["ranking"])

        def attend(values: Tensor) -> Tensor:
            if past:
                return self._attend(q, held[0], values, *held[2:], select=select, key_mask=key_mask)
            if self.options.padding_attends and layout.padding_mask is not None:
                return self._attend_padded(q, k, values, bias, ranking, select=select, mask=layout.padding_mask)
            # Without a past, padding and packing are one case: real tokens side by side.
            packed = (layout.pack(part) for part in (q, k, values, bias, ranking))
            return layout.unpack(self._attend(*packed, select=select, cu_seqlens=layout.sequences()))

        # The keys of a live cache stand in no order that weights could be reported in.
        slots = past and isinstance(cache, LiveKeyCache)
        out = attend(held[1]) if slots else layout.observed(attend, held[1] if past else v)
        return self.o_proj(out.flatten(2))

    def _step(self, x: Tensor, layout: SequenceLayout, cache: LiveKeyCache) -> Tensor:
        """One token per row: the same formulas, the live keys changed in place."""
        q, k, v = self._heads(x)
        norms = self._norms()
        if norms is None:
            q, k = self._normed(q, k)
        assert self.bias_proj is not None  # what has no bias evicts nothing
        if is_plain(self.v_proj, self.bias_proj):
            bias, ranking = self._scores(x, cache.once(self._folded))
        else:
            bias = ranking = self.key_bias(v)
        cos, sin = self._rotation(layout)
        out = dynamic_mask_step(
            q,
            k,
            v,
            bias,
            hidden(ranking, layout.padding_mask),
            cache.live(),
            keep=self.options.keep_window_size,
            cos=cos,
            sin=sin,
            norms=norms,
            norm_eps=self.options.norm_eps,
            backend=_kernels_unless_compiling(),
        )
        return self.o_proj(out.flatten(2))

    def project(self, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, K]`, keys and values `[B, T, G, K]` as the attention reads them."""
        q, k, v = self._heads(x)
        cos, sin = self._rotation(layout)
        norms = None if cos is None else self._norms()
        if norms is None:
            q, k = self._normed(q, k)
        if cos is not None and sin is not None:
            q, k = rotary_pair(q, k, cos, sin, norms=norms, norm_eps=self.options.norm_eps)
        return q, k, v

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before norms and rotation."""
        counts = (self.heads, self.key_heads, self.key_heads)
        parts = zip(projected(self, x), counts, strict=True)
        q, k, v = (part.unflatten(-1, (count, self.head_dim)) for part, count in parts)
        return q, k, v

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def _norms(self) -> tuple[Tensor, Tensor] | None:
        """The weights of both norms, where they say all that the norms compute: neither wrapped nor offloaded."""
        if type(self.q_norm) is not RMSNorm or type(self.k_norm) is not RMSNorm:
            return None
        q, k = self.q_norm.weight, self.k_norm.weight
        return None if q is None or k is None or q.is_meta else (q, k)

    def _rotation(self, layout: SequenceLayout) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if not self.options.rope:
            return None, None
        return layout.rotary(self.head_dim, self.rope_parameters, self.max_position_embeddings)

    def key_bias(self, v: Tensor) -> Tensor:
        """The bias of every key, `[B, T, M]` float32 or float64, from the values of all key-value heads."""
        if self.options.bias_form == "none" or self.bias_proj is None or self.bias_scale is None:
            return v.new_zeros((*v.shape[:2], self.bias_heads), dtype=compute_dtype(v))
        logits = self.bias_proj(v.flatten(2))
        with without_autocast(v):
            dtype = compute_dtype(v)
            bias = self.bias_scale.to(dtype) * softplus(logits.to(dtype))
            return bias.clamp(max=LARGEST_EXPONENT).exp() if self.options.bias_form == "exp" else bias

    def key_ranking(self, x: Tensor, bias: Tensor) -> Tensor:
        """What the keys are ranked by, `[B, T, M]`: A·softplus(z), from the layer's input (`dynamic_mask_scores`).

        Where `v_proj` is more than a plain linear layer, the bias itself is the ranking.
        """
        if not self.options.selection.startswith("topk") or self.bias_proj is None or self.bias_scale is None:
            return bias.detach()
        return self._scores(x, self._folded())[1] if is_plain(self.v_proj, self.bias_proj) else bias.detach()

    def _scores(self, x: Tensor, folded: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Bias and ranking of every key, from the layer's input."""
        assert self.bias_scale is not None
        exponential = self.options.bias_form == "exp"
        backend = _kernels_unless_compiling()
        return dynamic_mask_scores(x, *folded, self.bias_scale, exponential=exponential, backend=backend)

    @torch.no_grad()
    def _folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and offset, float64, that form z from the layer's input."""
        assert self.bias_proj is not None
        value, outer = self.v_proj, self.bias_proj.weight.double()
        offset = None
        if value.bias is not None and self.bias_proj.bias is not None:
            offset = outer @ value.bias.double() + self.bias_proj.bias.double()
        return outer @ value.weight.double(), offset

    def _attend_padded(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ranking: Tensor, *, select: str, mask: Tensor
    ) -> Tensor:
        """Every row attends, padded ones included; one that sees no real key weighs all values of its text alike.

        Padded keys are hidden by their bias: a window then counts places, padding included, as the released one does.
        """
        bias, ranking = (x.masked_fill(~mask.unsqueeze(-1), -torch.inf) for x in (bias, ranking))
        out = self._attend(q, k, v, bias, ranking, select=select)
        seen = mask.long().cumsum(1)
        if (window := self.options.sliding_window) is not None:
            seen = seen - nn.functional.pad(seen, (window, 0))[:, : seen.shape[1]]
        alike = v.mean(1, keepdim=True).repeat_interleave(self.heads // self.key_heads, dim=2)
        return torch.where((seen > 0)[..., None, None], out, alike)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ranking: Tensor, *, select: str, **visibility: Any
    ) -> Tensor:
        return dynamic_mask_attention(
            q,
            k,
            v,
            bias,
            ranking=ranking,
            select=select,
            keep=self.options.keep_window_size,
            block_size=self.options.smoothing_block,
            causal=self.causal,
            window=self.options.sliding_window,
            **visibility,
        )

    def new_cache(self) -> LayerCache:
        options = self.options
        if options.looks_ahead:
            return UnreturningCache(options.looks_ahead)
        if options.evicts:
            return LiveKeyCache(options.keep_window_size, self.bias_heads // self.key_heads)
        return BiasedKeyCache(options.sliding_window)

    def flops_per_token(self, length: int) -> float:
        options = self.options
        window = options.sliding_window
        if options.selection == "topk_causal":
            window = min(window or length, options.keep_window_size)
        seen = mean_keys_seen(length, window, self.causal)
        projections = [self.q_proj, self.k_proj, self.v_proj, self.o_proj]
        if self.bias_proj is not None:
            projections.append(self.bias_proj)
        return linear_flops(*projections) + 4.0 * self.heads * self.head_dim * seen

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        options = self.options
        if options.looks_ahead:
            return 0
        # float32 biases and rankings, and with evictions an int32 age per key and the count of tokens.
        bias, key = 8 * self.bias_heads, 2 * self.key_heads * self.head_dim * dtype.itemsize
        if options.evicts:
            sharing = self.bias_heads // self.key_heads
            return min(length, options.keep_window_size * sharing) * (key + bias + 4 * self.key_heads) + 4
        kept = length if options.sliding_window is None else min(length, options.sliding_window - 1)
        return kept * (key + bias)


def _kernels_unless_compiling() -> str:
    """`torch.compile` fuses the formulas of a step itself."""
    return "torch" if torch.compiler.is_compiling() else "auto"
