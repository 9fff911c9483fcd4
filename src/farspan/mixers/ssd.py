"""State space duality: the recurrence of Mamba-2, as Wonderful Matrices uses it."""

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
from farspan.nn.norms import RMSNorm
from farspan.nn.positions import apply_rotary
from farspan.ops._contract import compute_dtype
from farspan.ops.bidirectional import both_ways
from farspan.ops.short_convolution.api import short_convolution
from farspan.ops.short_convolution.step import short_convolution_step
from farspan.ops.ssd.api import state_space_duality
from farspan.ops.ssd.step import state_space_step

# The power of ten of what the fastest and the slowest head forget per token at first: memories of 10 and 1000 tokens.
FORGETTING = (-1.0, -3.0)


@dataclass
class SSDOptions:
    """Options of the `ssd` mixer. The published layers are `cheems_options` and `module_options` in
    `farspan.models.convert.cheems`; Mamba-2's is `rope=False, groups=1, conv_size=4, gated_norm=True`.

    Attributes:
        state_size: channels K of B and C per head; None is the number of value channels per head.
        value_dim: width of x over all heads; None is the model's.
        groups: number of different B and C, shared by the heads; None is one per head.
        tiled_groups: which group head h reads: True is h mod groups (seed module), False is ⌊h · groups / heads⌋.
        rope: whether C and B are rotated by position, as queries and keys are (Cheems).
        log_decay: True parameterises A = −exp(θ), which always forgets; False is A = θ itself (Cheems).
        dt_bias: whether the step size has a bias per head.
        skip: whether each head adds D · x (seed module).
        bias: whether the projections have biases.
        conv_size: width of Mamba-2's short causal convolution (with SiLU) over x, B and C; None leaves it out.
        gated_norm: whether the heads pass Mamba-2's RMSNorm(y ∘ SiLU(x W_z)) before the output projection.
        norm_eps: epsilon of that norm.
        initialization: `"stable"` spreads the heads' memories from 10 to 1000 tokens; `"released"` is the published
            one, A = −(1 … heads) for `log_decay` and A = +1 otherwise, whose state grows exponentially.
        padding_writes: as released: padded inputs are zeroed but still decay the state, and write to it where there
            are biases. False leaves padding out exactly.
    """

    state_size: int | None = None
    value_dim: int | None = None
    groups: int | None = None
    tiled_groups: bool = False
    rope: bool = True
    log_decay: bool = True
    dt_bias: bool = True
    skip: bool = True
    bias: bool = False
    conv_size: int | None = None
    gated_norm: bool = False
    norm_eps: float = 1e-5
    initialization: str = "stable"
    padding_writes: bool = False

    def __post_init__(self) -> None:
        for name in ("state_size", "value_dim", "groups", "conv_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"ssd: {name}={value} must be at least 1, or null for its default.")
        if self.initialization not in ("stable", "released"):
            raise ConfigError(f"ssd: initialization={self.initialization!r} is not known: 'stable' or 'released'.")


class SSDMixer(StateMixer):
    """State space duality, with u the normalised input and R the rotation by position:

        x = u W_x,  B = R(u W_B),  C = R(u W_C),  Δ = softplus(u W_Δ + b_Δ)
        S_t = exp(Δ_t A) S_{t−1} + B_tᵀ (Δ_t x_t);  y_t = C_t S_t + D x_t;  out = y W_o

    Optionally x, B and C first pass a short convolution, and y a gated norm, as in Mamba-2. Looking both ways, the
    recurrence runs over the sequence and over its reversal, and the results are added.

    Cost: O(T) time; a constant cache of H·K·V float32 numbers, and of `conv_size` inputs of the convolution.
    Source: Dao and Gu 2024, arXiv 2405.21060; Shi and Wu 2024, arXiv 2412.11834; LoserCheems/WonderfulMatrices:
    modules/ssd.py, models/modeling_cheems.py.
    """

    bidirectional: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = (
        "state_space_duality",
        "state_space_step",
        "short_convolution",
        "short_convolution_step",
    )
    no_weight_decay = ("convolution",)
    joint_projections = ("x_proj", "b_proj", "c_proj", "dt_proj")
    joint: Joint | None = None

    def __init__(self, config: MixerShape, options: SSDOptions, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.options = options
        self.causal = config.causal
        self.rope_parameters = config.rope_parameters
        self.max_position_embeddings = config.max_position_embeddings
        self.heads = config.num_attention_heads
        self.groups = options.groups or self.heads
        width, value_dim = config.hidden_size, options.value_dim or config.hidden_size
        if value_dim % self.heads:
            raise ConfigError(
                f"ssd: value_dim={value_dim} is not divisible by num_attention_heads={self.heads}; choose a multiple."
            )
        if self.heads % self.groups:
            divisors = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ConfigError(
                f"ssd: groups={self.groups} does not divide num_attention_heads={self.heads}; choose from {divisors}."
            )
        self.head_value = value_dim // self.heads
        self.state_size = options.state_size or self.head_value
        if options.rope and self.state_size % 2:
            raise ConfigError(
                f"ssd: RoPE rotates pairs of channels, but the state size is {self.state_size}; choose an even "
                "state_size or set rope to false."
            )
        self.x_proj = nn.Linear(width, value_dim, bias=options.bias)
        self.b_proj = nn.Linear(width, self.groups * self.state_size, bias=options.bias)
        self.c_proj = nn.Linear(width, self.groups * self.state_size, bias=options.bias)
        self.dt_proj = nn.Linear(width, self.heads, bias=False)
        self.o_proj = nn.Linear(value_dim, width, bias=options.bias)
        self.gate_proj = nn.Linear(width, value_dim, bias=options.bias) if options.gated_norm else None
        self.gate_norm = RMSNorm(value_dim, options.norm_eps) if options.gated_norm else None
        self.decay = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads)) if options.dt_bias else None
        self.skip = nn.Parameter(torch.empty(self.heads)) if options.skip else None
        channels = value_dim + 2 * self.groups * self.state_size
        kernel = torch.empty(channels, options.conv_size) if options.conv_size else None
        self.convolution = nn.Parameter(kernel) if kernel is not None else None
        self.convolution_bias = nn.Parameter(torch.empty(channels)) if kernel is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        forgetting = torch.logspace(*FORGETTING, self.heads)
        if self.options.initialization == "released":
            numbers = torch.arange(1.0, self.heads + 1)
            decay, step = (-numbers if self.options.log_decay else torch.ones(self.heads)), torch.zeros(self.heads)
        elif self.dt_bias is not None:
            decay, step = -torch.ones(self.heads), forgetting.expm1().log()  # softplus(step) = forgetting
        else:
            decay, step = -forgetting / math.log(2), torch.zeros(self.heads)  # softplus(0) = log 2
        with torch.no_grad():
            self.decay.copy_((-decay).log() if self.options.log_decay else decay)
            if self.dt_bias is not None:
                self.dt_bias.copy_(step)
        if self.skip is not None:
            nn.init.ones_(self.skip)
        if self.convolution is not None and self.convolution_bias is not None:
            bound = 1 / math.sqrt(self.convolution.shape[-1])
            nn.init.uniform_(self.convolution, -bound, bound)
            nn.init.uniform_(self.convolution_bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        *,
        layout: SequenceLayout,
        cache: LayerCache | None = None,
        sequence_parallel: Any = None,
    ) -> Tensor:
        cos, sin = self._rotary(layout)
        assert cache is None or isinstance(cache, StateCache)
        if cache is not None and takes_step(x, layout, cache):
            return self._step(x, cos, sin, cache)
        if self.options.padding_writes and layout.padding_mask is not None:
            x = x * layout.padding_mask.unsqueeze(-1)
            layout = SequenceLayout(layout.positions, cu_seqlens=layout.cu_seqlens)
        if cos is not None and sin is not None:
            cos, sin = layout.pack(cos), layout.pack(sin)
        x, boundaries = layout.pack(x), layout.sequences()
        streams = (self.x_proj(x), self.b_proj(x), self.c_proj(x), self.dt_proj(x), cos, sin)
        if self.causal:
            out = self._recurrence(*streams, boundaries=boundaries, cache=cache)
        else:
            run = functools.partial(self._recurrence, boundaries=boundaries)
            out = both_ways(run, *streams, cu_seqlens=boundaries)
        if self.gate_proj is not None and self.gate_norm is not None:
            out = self.gate_norm(out * nn.functional.silu(self.gate_proj(x)))
        return layout.unpack(self.o_proj(out))

    def _step(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: StateCache) -> Tensor:
        """One token per row: the same formulas, both states updated in place."""
        if self.joint is None:
            streams = tuple(getattr(self, name)(x) for name in self.joint_projections)
        else:
            streams = self.joint(x)
        value, b, c, dt = streams
        if self.convolution is not None:
            joined = torch.cat((value, b, c), dim=-1)
            joined = short_convolution_step(
                joined, self.convolution, cache.tensors["convolution"], self.convolution_bias
            )
            value, b, c = joined.split((value.shape[-1], b.shape[-1], c.shape[-1]), dim=-1)
        b, c = (self._keys(stream, None, None) for stream in (b, c))
        out = state_space_step(
            value.unflatten(-1, (self.heads, self.head_value)),
            dt,
            self._rate(),
            b,
            c,
            self.skip,
            cache.tensors["recurrent"],
            dt_bias=self.dt_bias,
            cos=cos,
            sin=sin,
        ).flatten(2)
        if self.gate_proj is not None and self.gate_norm is not None:
            out = self.gate_norm(out * nn.functional.silu(self.gate_proj(x)))
        return self.o_proj(out)

    def _recurrence(
        self,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        boundaries: Tensor | None,
        cache: StateCache | None = None,
    ) -> Tensor:
        """Convolution, rotation and recurrence of packed `[B, T, …]` streams; returns `[B, T, H·V]`."""
        convolution_state = None
        if self.convolution is not None:
            joined, convolution_state = short_convolution(
                torch.cat((x, b, c), dim=-1),
                self.convolution,
                self.convolution_bias,
                initial_state=cache.get("convolution") if cache else None,
                output_final_state=cache is not None,
                cu_seqlens=boundaries,
            )
            x, b, c = joined.split((x.shape[-1], b.shape[-1], c.shape[-1]), dim=-1)
        b, c = (self._keys(stream, cos, sin) for stream in (b, c))
        out, recurrent_state = state_space_duality(
            x.unflatten(-1, (self.heads, self.head_value)),
            dt,
            self._rate(),
            b,
            c,
            self.skip,
            dt_bias=self.dt_bias,
            initial_state=cache.get("recurrent") if cache else None,
            output_final_state=cache is not None,
            cu_seqlens=boundaries,
        )
        if cache is not None:
            cache.update(convolution=convolution_state, recurrent=recurrent_state)
        return out.flatten(2)

    def _keys(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """B or C as `[B, T, G, K]`, rotated, with the groups in the order in which the operator hands them out."""
        x = x.unflatten(-1, (self.groups, self.state_size))
        if cos is not None and sin is not None:
            x = apply_rotary(x, cos, sin)
        return x.repeat(1, 1, self.heads // self.groups, 1) if self.options.tiled_groups else x

    def _rate(self) -> Tensor:
        """A, in float32 at least: 16 bits would round the exponent."""
        decay = self.decay.to(compute_dtype(self.decay))
        return -decay.exp() if self.options.log_decay else decay

    def _rotary(self, layout: SequenceLayout) -> tuple[Tensor | None, Tensor | None]:
        if not self.options.rope:
            return None, None
        return layout.rotary(self.state_size, self.rope_parameters, self.max_position_embeddings)

    def flops_per_token(self, length: int) -> float:
        projections = [self.x_proj, self.b_proj, self.c_proj, self.dt_proj, self.o_proj]
        if self.gate_proj is not None:
            projections.append(self.gate_proj)
        # The recurrence: B_tᵀ x_t into the state and C_t S_t out of it, one multiply-add per state entry each.
        recurrence = 4.0 * self.heads * self.state_size * self.head_value
        convolution = 2.0 * self.convolution.numel() if self.convolution is not None else 0.0
        return linear_flops(*projections) + (recurrence + convolution) * (1 if self.causal else 2)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        recurrent = max(torch.float32.itemsize, dtype.itemsize) * self.heads * self.state_size * self.head_value
        convolution = self.convolution.numel() * dtype.itemsize if self.convolution is not None else 0
        return recurrent + convolution
