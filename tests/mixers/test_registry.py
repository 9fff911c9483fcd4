"""A mechanism from outside: one class, one registration, and it trains, caches and generates in the one stack."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farspan import FarspanConfig, FarspanForCausalLM, Mixer, register_feed_forward, register_mixer
from farspan.errors import ConfigError
from farspan.mixers import LayerCache, SequenceLayout, StateCache
from farspan.nn.feed_forward import AuxiliaryRecord, FeedForward


@dataclass
class RunningMeanOptions:
    gain: float = 1.0


class RunningMean(Mixer):
    """y_t = W · gain · mean of x_1 … x_t."""

    def __init__(self, config: Any, options: RunningMeanOptions, layer_idx: int) -> None:
        super().__init__()
        self.gain = options.gain
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    @staticmethod
    def cache_kind(options: Any) -> Any:
        return "state"

    def forward(self, x: Tensor, *, layout: SequenceLayout, cache: LayerCache | None = None, **_: Any) -> Tensor:
        total = x.cumsum(1)
        count = layout.positions.unsqueeze(-1) + 1
        if isinstance(cache, StateCache):
            past = cache.get("sum")
            total = total if past is None else total + past
            cache.update(sum=total[:, -1:])
        return self.o_proj(self.gain * total / count)

    def new_cache(self) -> LayerCache:
        return StateCache()

    def flops_per_token(self, length: int) -> float:
        return 2.0 * self.o_proj.weight.numel()

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        return self.o_proj.in_features * dtype.itemsize


class ScaledMLP(FeedForward):
    """A feed-forward with an auxiliary loss."""

    def __init__(self, config: Any, options: RunningMeanOptions) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, AuxiliaryRecord]:
        y = self.proj(x)
        return y, AuxiliaryRecord(loss=0.1 * y.square().mean())

    def flops_per_token(self) -> float:
        return 2.0 * self.proj.weight.numel()


register_mixer("running_mean", RunningMean, RunningMeanOptions)
register_feed_forward("scaled_mlp", ScaledMLP, RunningMeanOptions)


def _model() -> FarspanForCausalLM:
    config = FarspanConfig(
        vocab_size=16,
        hidden_size=16,
        num_attention_heads=2,
        mixers=["running_mean", "metala"],
        mixer_options={"running_mean": {"gain": 2.0}},
        feed_forwards=["gated_mlp", "scaled_mlp"],
    )
    return FarspanForCausalLM(config)


def test_a_foreign_mixer_trains() -> None:
    model = _model()
    ids = torch.arange(16).repeat(2, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        out = model(ids, labels=ids)
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert out.aux_loss is not None and out.aux_loss > 0
    assert model.flops_per_token(32) > 2 * 16 * 16


def test_a_foreign_mixer_decodes_with_its_cache() -> None:
    model = _model().eval()
    ids = torch.randint(0, 16, (2, 6))
    with_cache = model.generate(ids, max_new_tokens=6, do_sample=False)
    without = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert with_cache.tolist() == without.tolist()


def test_names_are_taken_once() -> None:
    with pytest.raises(ConfigError, match="'softmax' is taken"):
        register_mixer("softmax", RunningMean, RunningMeanOptions)
    with pytest.raises(ConfigError, match="must be a dataclass"):
        register_mixer("other", RunningMean, dict)
    register_mixer("running_mean", RunningMean, RunningMeanOptions)  # the same class again is no error


def test_a_context_of_ranks_is_refused_where_it_would_be_ignored() -> None:
    mixer = _model().model.blocks[1].mixer
    layout = SequenceLayout(torch.arange(3).unsqueeze(0))
    with pytest.raises(ConfigError, match="cut over ranks"):
        mixer(torch.zeros(1, 3, 16), layout=layout, sequence_parallel=object())
