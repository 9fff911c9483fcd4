"""One layer of the stack: a mixer and a feed-forward, and how both are joined to the residual stream."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from farspan.mixers.base import MIXERS, Mixer
from farspan.mixers.cache import LayerCache
from farspan.mixers.layout import SequenceLayout
from farspan.nn.feed_forward import FEED_FORWARDS, AuxiliaryRecord, FeedForward
from farspan.nn.norms import make_norm

if TYPE_CHECKING:
    from farspan.models.configuration import FarspanConfig

# Projections that carry values to the residual stream: what sub-LN and DeepNorm initialise to another size.
_SCALED = ("v_proj", "o_proj", "up_proj", "down_proj")
# Attribute of a linear layer: factor of its initial standard deviation.
INITIAL_SCALE = "_farspan_initial_scale"


class FarspanBlock(GradientCheckpointingLayer):
    """Mixer M, feed-forward F and norms N, joined as the config's block description says.

    - pre-norm: x ← a ∘ x + M(N₁ x), then x ← b ∘ x + F(N₂ x);
    - post-norm: x ← N₁(a ∘ x + M x), then x ← N₂(b ∘ x + F x);
    - parallel: x ← x + M(N₁ x) + F(N₂ x), or F(N₁ x) with one shared norm.

    a and b are 1, learned per channel, or DeepNorm's (2·layers)^¼. Dropout and stochastic depth act on the branches.
    """

    def __init__(self, config: "FarspanConfig", layer_idx: int) -> None:
        super().__init__()
        mixer, feed_forward = config.mixers[layer_idx], config.feed_forwards[layer_idx]
        mixer_class, _ = MIXERS.get(mixer)
        mixer_options = MIXERS.build_options(mixer, config.mixer_options.get(mixer))
        feed_forward_class, _ = FEED_FORWARDS.get(feed_forward)
        feed_forward_options = FEED_FORWARDS.build_options(feed_forward, config.feed_forward_options.get(feed_forward))
        self.post_norm = config.norm_place == "post"
        self.parallel = config.use_parallel_residual
        self.mixer_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.mixer: Mixer = mixer_class(config, mixer_options, layer_idx)
        shared_norm = config.use_parallel_residual and config.shared_parallel_norm
        self.feed_forward_norm = (
            None if shared_norm else make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        )
        self.feed_forward: FeedForward = feed_forward_class(config, feed_forward_options)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.drop_path = DropPath(config.drop_path_rate * layer_idx / max(len(config.mixers) - 1, 1))
        self.residual_scale = residual_scale(config.residual_scaling, len(config.mixers))
        per_channel = config.residual_scaling == "per_channel"
        self.mixer_residual = nn.Parameter(torch.ones(config.hidden_size)) if per_channel else None
        self.feed_forward_residual = nn.Parameter(torch.ones(config.hidden_size)) if per_channel else None
        scale = branch_scale(config.norm_place, config.residual_scaling, len(config.mixers))
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in _SCALED:
                setattr(module, INITIAL_SCALE, scale)

    def reset_parameters(self) -> None:
        for residual in (self.mixer_residual, self.feed_forward_residual):
            if residual is not None:
                nn.init.ones_(residual)

    def forward(
        self, x: Tensor, *, layout: SequenceLayout, cache: LayerCache | None = None
    ) -> tuple[Tensor, AuxiliaryRecord | None]:
        if self.parallel:
            normed = self.mixer_norm(x)
            mixed = self.mixer(normed, layout=layout, cache=cache)
            y, aux = self._feed(normed if self.feed_forward_norm is None else self.feed_forward_norm(x), layout)
            return self._join(self._join(x, mixed), y), aux
        assert self.feed_forward_norm is not None
        if self.post_norm:
            x = self.mixer_norm(self._join(x, self.mixer(x, layout=layout, cache=cache), self.mixer_residual))
            y, aux = self._feed(x, layout)
            return self.feed_forward_norm(self._join(x, y, self.feed_forward_residual)), aux
        x = self._join(x, self.mixer(self.mixer_norm(x), layout=layout, cache=cache), self.mixer_residual)
        y, aux = self._feed(self.feed_forward_norm(x), layout)
        return self._join(x, y, self.feed_forward_residual), aux

    def _feed(self, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, AuxiliaryRecord | None]:
        known = {"padding_mask": layout.padding_mask} if self.feed_forward.reads_padding else {}
        return self.feed_forward(x, **known)

    def _join(self, x: Tensor, branch: Tensor, multiplier: Tensor | None = None) -> Tensor:
        if multiplier is not None:
            x = multiplier * x
        if self.residual_scale != 1:
            x = self.residual_scale * x
        return x + self.drop_path(self.dropout(branch))


class DropPath(nn.Module):
    """Stochastic depth: in training, a branch is left out for a whole row with probability `rate`, else divided by
    1 − rate.

    Source: Huang et al. 2016, arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty((x.shape[0], *(1,) * (x.dim() - 1))).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def residual_scale(scaling: str, layers: int) -> float:
    """The constant that multiplies the residual stream: DeepNorm's (2·layers)^¼, else 1.

    Source: Wang et al. 2022, arXiv 2203.00555.
    """
    return (2 * layers) ** 0.25 if scaling == "deepnorm" else 1.0


def branch_scale(norm_place: str, scaling: str, layers: int) -> float:
    """Factor of the initial size of the projections inside the branches.

    √ln(2·layers) for sub-LN (Wang et al. 2022, arXiv 2210.06423), (8·layers)^−¼ for DeepNorm, else 1.
    """
    if scaling == "deepnorm":
        return (8 * layers) ** -0.25
    return math.sqrt(math.log(2 * layers)) if norm_place == "sub" else 1.0
