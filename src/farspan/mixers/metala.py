"""MetaLA: linear attention with a decay per channel and no key of its own."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError
from farspan.mixers.base import MixerShape, StateMixer, linear_flops, takes_step
from farspan.mixers.cache import LayerCache, StateCache
from farspan.mixers.layout import SequenceLayout
from farspan.nn.joint import Joint
from farspan.ops.bidirectional import both_ways
from farspan.ops.metala.api import metala_attention
from farspan.ops.metala.step import metala_step
from farspan.ops.short_convolution.api import short_convolution
from farspan.ops.short_convolution.step import short_convolution_step


@dataclass
class MetaLAOptions:
    """Options of the `metala` mixer; the defaults are the released semantics.

    Attributes:
        conv_size: width of the short causal convolution before the projections; None leaves it and its SiLU out.
        self_augmentation: whether each token adds sigmoid(u·v) of its own value, u = q·(k∘w).
        augmentation_inside: True is sigmoid(u·v) (released), False is sigmoid(u)·v.
        use_key: ablation: an own key projection instead of k = 1 − decay.
        decay_normalizer: τ in decay = sigmoid(z)^(1/τ).
        scale: factor on the recurrent term; None is K^−½ (released), 1.0 is the paper's.
        key_dim: query and decay width over all heads; None is half of the model's.
        value_dim: value width over all heads; None is the model's.
        norm_eps: epsilon of the per-head layer normalisation.
        gate_bias: whether the output gate has a bias (released: yes).
    """

    conv_size: int | None = 4
    self_augmentation: bool = True
    augmentation_inside: bool = True
    use_key: bool = False
    decay_normalizer: float = 16.0
    scale: float | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    norm_eps: float = 1e-5
    gate_bias: bool = True

    def __post_init__(self) -> None:
        if self.conv_size is not None and self.conv_size < 1:
            raise ConfigError(f"conv_size={self.conv_size} must be at least 1, or null for no convolution.")
        for name in ("decay_normalizer", "norm_eps", "scale", "key_dim", "value_dim"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value} must be positive; leave it out for the released value.")


class MetaLAMixer(StateMixer):
    """MetaLA's token mixer, with x already normalised:

        x' = SiLU(conv(x));  q = x' W_q,  z = x' W_z,  v = x' W_v,  g = x' W_g + b_g
        a = logsigmoid(z)/τ,  k = 1 − e^a;  S_t = diag(e^{a_t}) S_{t−1} + k_tᵀ v_t
        o_t = scale · q_t S_t + sigmoid(u_t v_t),  u_t = q_t·(k_t ∘ w);  y = (SiLU(g) ∘ LayerNorm_head(o)) W_o

    Bidirectional (the library's definition; the published code is causal), the convolution and the normalised o are
    each the sum of a pass over the sequence and one over its reversal, with the same parameters; each token counts
    itself in both. The projections and the gate run once.

    Cost: O(T) time; a constant cache of H·K·V float32 numbers and `conv_size` inputs.
    Source: Chou et al. 2024, arXiv 2411.10741; BICLab/MetaLA: metala/modeling_metala.py.
    """

    bidirectional: ClassVar[bool] = True
    compact_cache: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = (
        "metala_attention",
        "metala_step",
        "short_convolution",
        "short_convolution_step",
    )
    no_weight_decay = ("augmentation", "convolution")
    joint_projections = ("q_proj", "decay_proj", "v_proj", "gate_proj")
    joint: Joint | None = None

    def __init__(self, config: MixerShape, options: MetaLAOptions, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.options = options
        self.heads = config.num_attention_heads
        self.causal = config.causal
        width = config.hidden_size
        key_dim, value_dim = options.key_dim or width // 2, options.value_dim or width
        for name, size in (("key_dim", key_dim), ("value_dim", value_dim)):
            if size % self.heads:
                raise ConfigError(
                    f"metala: {name}={size} is not divisible by num_attention_heads={self.heads}; choose a multiple."
                )
        self.head_key, self.head_value = key_dim // self.heads, value_dim // self.heads
        self.q_proj = nn.Linear(width, key_dim, bias=False)
        self.decay_proj = nn.Linear(width, key_dim, bias=False)
        self.k_proj = nn.Linear(width, key_dim, bias=False) if options.use_key else None
        self.v_proj = nn.Linear(width, value_dim, bias=False)
        self.gate_proj = nn.Linear(width, value_dim, bias=options.gate_bias)
        self.o_proj = nn.Linear(value_dim, width, bias=False)
        augmentation = torch.zeros(self.heads, self.head_key) if options.self_augmentation else None
        self.augmentation = nn.Parameter(augmentation) if augmentation is not None else None
        convolution = torch.empty(width, options.conv_size) if options.conv_size else None
        self.convolution = nn.Parameter(convolution) if convolution is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.augmentation is not None:
            nn.init.zeros_(self.augmentation)
        if self.convolution is not None:
            bound = 1 / math.sqrt(self.convolution.shape[-1])
            nn.init.uniform_(self.convolution, -bound, bound)

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
            return self._step(x, cache)
        # Zeros ahead of a text leave the state and the convolution's memory as they are: at zero.
        x, boundaries = layout.pack(x, ahead=True), layout.sequences()
        convolve = functools.partial(self._convolve, boundaries=boundaries, cache=cache)
        attend = functools.partial(self._attend, boundaries=boundaries, cache=cache)
        if not self.causal:
            convolve, attend = (functools.partial(both_ways, run, cu_seqlens=boundaries) for run in (convolve, attend))
        if self.convolution is not None:
            x = convolve(x)
        out = attend(
            self.q_proj(x).unflatten(-1, (self.heads, self.head_key)),
            self.decay_proj(x).unflatten(-1, (self.heads, self.head_key)),
            self.v_proj(x).unflatten(-1, (self.heads, self.head_value)),
            None if self.k_proj is None else self.k_proj(x).unflatten(-1, (self.heads, self.head_key)),
        )
        return layout.unpack(self.o_proj(nn.functional.silu(self.gate_proj(x)) * out.flatten(2)), ahead=True)

    def _step(self, x: Tensor, cache: StateCache) -> Tensor:
        """One token per row: the same formulas, both states updated in place."""
        if self.convolution is not None:
            x = short_convolution_step(x, self.convolution, cache.tensors["convolution"])
        if self.joint is None:
            q, gate, v, output_gate = (getattr(self, name)(x) for name in self.joint_projections)
        else:
            q, gate, v, output_gate = self.joint(x)
        out = metala_step(
            q.unflatten(-1, (self.heads, self.head_key)),
            gate.unflatten(-1, (self.heads, self.head_key)),
            v.unflatten(-1, (self.heads, self.head_value)),
            self.augmentation,
            cache.tensors["recurrent"],
            key=None if self.k_proj is None else self.k_proj(x).unflatten(-1, (self.heads, self.head_key)),
            output_gate=output_gate.unflatten(-1, (self.heads, self.head_value)),
            scale=self.options.scale,
            decay_normalizer=self.options.decay_normalizer,
            augmentation_inside=self.options.augmentation_inside,
            norm_eps=self.options.norm_eps,
        )
        return self.o_proj(out.flatten(2))

    def _convolve(self, x: Tensor, *, boundaries: Tensor | None, cache: StateCache | None) -> Tensor:
        assert self.convolution is not None
        x, state = short_convolution(
            x,
            self.convolution,
            initial_state=cache.get("convolution") if cache else None,
            output_final_state=cache is not None,
            cu_seqlens=boundaries,
        )
        if cache is not None:
            cache.update(convolution=state)
        return x

    def _attend(
        self,
        q: Tensor,
        gate: Tensor,
        v: Tensor,
        key: Tensor | None,
        *,
        boundaries: Tensor | None,
        cache: StateCache | None,
    ) -> Tensor:
        out, state = metala_attention(
            q,
            gate,
            v,
            self.augmentation,
            key=key,
            scale=self.options.scale,
            decay_normalizer=self.options.decay_normalizer,
            augmentation_inside=self.options.augmentation_inside,
            norm_eps=self.options.norm_eps,
            initial_state=cache.get("recurrent") if cache else None,
            output_final_state=cache is not None,
            cu_seqlens=boundaries,
        )
        if cache is not None:
            cache.update(recurrent=state)
        return out

    def flops_per_token(self, length: int) -> float:
        projections = [self.q_proj, self.decay_proj, self.v_proj, self.gate_proj, self.o_proj]
        if self.k_proj is not None:
            projections.append(self.k_proj)
        # The recurrence: k_tᵀ v_t into the state and q_t S_t out of it, one multiply-add per state entry each.
        recurrence = 4.0 * self.heads * self.head_key * self.head_value
        convolution = 2.0 * self.convolution.numel() if self.convolution is not None else 0.0
        directions = 1 if self.causal else 2
        return linear_flops(*projections) + directions * (recurrence + convolution)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        recurrent = 4 * self.heads * self.head_key * self.head_value
        convolution = self.convolution.numel() * dtype.itemsize if self.convolution is not None else 0
        return recurrent + convolution
