"""Decay groups, schedules and the guard against numbers that are none."""

import itertools
import math

import pytest
import torch
from torch import nn

from farspan.training.guard import NonFiniteError, check_finite
from farspan.training.optimizer import build_optimizer, decay_groups, learning_rate
from farspan.training.recipe import TrainRecipe


class Gate(nn.Module):
    no_weight_decay = ("rate",)

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(2, 3))
        self.weight = nn.Parameter(torch.ones(2, 3))


def test_only_matrices_that_allow_it_decay() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(3), "gate": Gate(), "tied": nn.Linear(3, 2)})
    model["tied"].weight = model["linear"].weight
    model["tied"].bias.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, exempt = ([names[id(p)] for p in group["params"]] for group in decay_groups(model, 0.1))
    assert decaying == ["linear.weight", "gate.weight"]
    assert exempt == ["linear.bias", "norm.weight", "norm.bias", "gate.rate"]


def test_decay_shrinks_and_exemption_holds() -> None:
    gate = Gate()
    optimizer = build_optimizer(gate, TrainRecipe(max_steps=1, learning_rate=0.1, weight_decay=0.5))
    for parameter in gate.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(gate.weight, torch.full((2, 3), 0.95))
    torch.testing.assert_close(gate.rate, torch.ones(2, 3))


def test_the_real_model_exempts_what_its_modules_name() -> None:
    from farspan.models import FarspanConfig, FarspanForCausalLM

    config = FarspanConfig(vocab_size=16, hidden_size=16, num_attention_heads=2, mixers=["metala", "softmax"])
    model = FarspanForCausalLM(config)
    decaying, exempt = decay_groups(model, 0.1)
    assert len(decaying["params"]) + len(exempt["params"]) == sum(p.requires_grad for p in model.parameters())
    assert all(parameter.ndim >= 2 for parameter in decaying["params"])
    assert any(parameter is model.lm_head.weight for parameter in decaying["params"])


def rates(total: int, **values: object) -> list[float]:
    recipe = TrainRecipe(learning_rate=2.0, max_steps=total, **values)  # type: ignore[arg-type]
    return [learning_rate(step, recipe, total) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_linearly_to_the_peak_from_the_first_step_on(kind: str) -> None:
    assert rates(100, lr_scheduler_type=kind, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_least_rate_and_nothing_rises_after_warm_up(kind: str) -> None:
    values = rates(100, lr_scheduler_type=kind, warmup_steps=10, min_lr_ratio=0.25)
    assert values[-1] == pytest.approx(0.5)
    assert max(values) == values[9] == 2.0
    assert all(after <= before for before, after in itertools.pairwise(values[9:]))


def test_shapes_at_half_time() -> None:
    assert rates(101, lr_scheduler_type="cosine", warmup_steps=1, min_lr_ratio=0)[50] == pytest.approx(1.0)
    assert rates(101, lr_scheduler_type="linear", warmup_steps=1, min_lr_ratio=0)[25] == pytest.approx(1.5)
    assert set(rates(10, lr_scheduler_type="constant")) == {2.0}


def test_wsd_holds_the_peak_then_falls_with_the_square_root() -> None:
    values = rates(100, lr_scheduler_type="wsd", min_lr_ratio=0, decay_steps=16)
    assert set(values[:84]) == {2.0}
    assert values[87] == pytest.approx(2.0 * (1 - math.sqrt(4 / 16)))
    assert rates(100, lr_scheduler_type="wsd")[79:81] == [2.0, pytest.approx(2 - 1.8 * math.sqrt(1 / 20))]


def test_edge_lengths_give_finite_rates() -> None:
    for kind in ("cosine", "linear", "wsd", "constant"):
        for total, warmup in ((1, 0), (1, 1), (3, 10), (2, 2)):
            values = rates(total, lr_scheduler_type=kind, warmup_steps=warmup)
            assert all(0 < value <= 2.0 for value in values)


def model_with_gradients() -> nn.Linear:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    return model


def test_the_guard_names_step_and_parameter() -> None:
    model = model_with_gradients()
    check_finite(3, 1.0, 2.0, model)
    model.bias.grad[1] = math.inf
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is 1, but 1 of 2 gradients of 'bias' \(2,\)"):
        check_finite(3, 1.0, math.inf, model)


def test_the_guard_names_the_loss_and_broken_weights() -> None:
    model = model_with_gradients()
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan; the weights were not changed"):
        check_finite(4, math.nan, 1.0, model)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"the weights 'weight' \(2, 2\) hold NaN"):
        check_finite(4, math.nan, math.nan, model)


def test_the_guard_tells_an_overflowing_norm_from_a_broken_gradient() -> None:
    with pytest.raises(NonFiniteError, match="every gradient is finite, but their norm overflows"):
        check_finite(1, 1.0, math.inf, model_with_gradients())
