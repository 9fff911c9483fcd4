"""Feed-forwards: what follows the mixer in every block. Contract: `forward(x) -> (y, aux)`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError, nearest
from farspan.nn.joint import Joint, projected
from farspan.nn.registry import Registry
from farspan.ops.activations import ACTIVATIONS
from farspan.ops.swiglu.api import swiglu


@dataclass
class AuxiliaryRecord:
    """What a feed-forward reports beside its output; the model combines them (`balance.auxiliary_loss`).

    Attributes:
        loss: scalar to add to the training loss, or None.
        statistics: named scalars for the log, e.g. router entropy.
        load: share of the selections that each expert received, `[E]`, summing to 1; None without experts.
        probability: mean probability that the router gave each expert, `[E]`, summing to 1, differentiable.
        pooled: factor of a load-balancing loss that is formed from the means over the layers; 0 has none.
    """

    loss: Tensor | None = None
    statistics: dict[str, Tensor] | None = None
    load: Tensor | None = None
    probability: Tensor | None = None
    pooled: float = 0.0


class FeedForwardShape(Protocol):
    """What a feed-forward may read of the model's config."""

    hidden_size: int
    intermediate_size: int
    hidden_act: str
    initializer_range: float
    norm_eps: float


class FeedForward(nn.Module):
    """Base class: a map of each token by itself.

    Subclasses are built as `Class(config, options)` and implement:

    - `forward(x) -> (y, aux)`: `x`, `y` are `[..., D]`, `aux` is None or an `AuxiliaryRecord`;
    - `flops_per_token() -> float`: forward, 2 per multiply-add;
    - `reset_parameters()` for parameters that the model's default initialisation does not know
      (it knows `nn.Linear` and `nn.Embedding`).

    Attributes:
        no_weight_decay: names of the module's own parameters that the optimiser must not shrink.
        row_sparse: names of those of its tables of which a token reads few rows; the optimiser may spare the others.
        reads_padding: whether forward takes `padding_mask`, `[...]` bool or None, True for real tokens: for
            feed-forwards that count over tokens. (Padding never changes the output of a real token.)
    """

    no_weight_decay: tuple[str, ...] = ()
    row_sparse: tuple[str, ...] = ()
    reads_padding: ClassVar[bool] = False

    def forward(self, x: Tensor) -> tuple[Tensor, AuxiliaryRecord | None]:
        raise NotImplementedError

    def flops_per_token(self) -> float:
        raise NotImplementedError


@dataclass
class MLPOptions:
    """Options of `mlp` and `gated_mlp`.

    Attributes:
        intermediate_size: width inside; None takes the model's `intermediate_size`.
        hidden_act: activation; None takes the model's `hidden_act`.
        bias: whether the projections have biases.
        sub_norm: whether a LayerNorm stands before the output projection (sub-LN).
    """

    intermediate_size: int | None = None
    hidden_act: str | None = None
    bias: bool = False
    sub_norm: bool = False

    def __post_init__(self) -> None:
        if self.hidden_act is not None:
            activation(self.hidden_act)
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ConfigError(f"intermediate_size={self.intermediate_size} must be at least 1.")


def activation(name: str) -> Any:
    """The elementwise function named `name`.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"Unknown hidden_act {name!r}: {nearest(str(name), ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(FeedForward):
    """y = LN?(act(x W_up)) W_down; the norm with `sub_norm` only.

    Cost: 4·D·F operations a token for inner width F.
    """

    def __init__(self, config: FeedForwardShape, options: MLPOptions) -> None:
        super().__init__()
        inner = options.intermediate_size or config.intermediate_size
        self.activation = activation(options.hidden_act or config.hidden_act)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=options.bias)
        self.sub_norm = nn.LayerNorm(inner, eps=config.norm_eps) if options.sub_norm else nn.Identity()
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=options.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, AuxiliaryRecord | None]:
        return self.down_proj(self.sub_norm(self.activation(self.up_proj(x)))), None

    def flops_per_token(self) -> float:
        return 2.0 * (self.up_proj.weight.numel() + self.down_proj.weight.numel())


class GatedMLP(FeedForward):
    """y = LN?(act(x W_gate) ∘ x W_up) W_down; the norm with `sub_norm` only; with `silu` this is SwiGLU.

    Cost: 6·D·F operations a token for inner width F.
    Source: Shazeer 2020, arXiv 2002.05202.
    """

    joint_projections = ("gate_proj", "up_proj")
    joint: Joint | None = None

    def __init__(self, config: FeedForwardShape, options: MLPOptions) -> None:
        super().__init__()
        inner = options.intermediate_size or config.intermediate_size
        self.activation = activation(options.hidden_act or config.hidden_act)
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=options.bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=options.bias)
        self.sub_norm = nn.LayerNorm(inner, eps=config.norm_eps) if options.sub_norm else nn.Identity()
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=options.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, AuxiliaryRecord | None]:
        gate, up = projected(self, x)
        # The compiler fuses the product with its neighbours.
        fused = self.activation is ACTIVATIONS["silu"] and not torch.compiler.is_compiling() and x.dim() == 3
        inner = swiglu(gate, up) if fused else self.activation(gate) * up
        return self.down_proj(self.sub_norm(inner)), None

    def flops_per_token(self) -> float:
        return 2.0 * (self.gate_proj.weight.numel() + self.up_proj.weight.numel() + self.down_proj.weight.numel())


FEED_FORWARDS: Registry[FeedForward] = Registry(
    "feed-forward",
    {
        "cdmoe": "farspan.nn.experts.cdmoe:CDMoE:CDMoEOptions",
        "gated_mlp": "farspan.nn.feed_forward:GatedMLP:MLPOptions",
        "mlp": "farspan.nn.feed_forward:MLP:MLPOptions",
        "peer": "farspan.nn.experts.peer:PEER:PEEROptions",
        "seimoe": "farspan.nn.experts.seimoe:SEIMoE:SEIMoEOptions",
    },
)


def register_feed_forward(name: str, block: type[FeedForward], options: type) -> None:
    """Makes `FarspanConfig(feed_forwards=[name])` build `block`; see `FeedForward` for what it must offer."""
    FEED_FORWARDS.register(name, block, options)
