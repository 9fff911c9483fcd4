"""A cache can be copied, continued in another gradient mode, and differentiated through by the tokens that are new."""

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.models import FarspanForCausalLM
from farspan.models.cache import FarspanCache
from farspan.training.setup import recompute_activations
from tests import tolerances
from tests.models.conftest import tiny
from tests.ops.checks import assert_close

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


def text(length: int = 12) -> Tensor:
    """No token twice in a row: between equals a selection of keys is a tie, which any step of a parameter decides."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([1 + torch.randperm(60, generator=generator)[:length] for _ in range(2)])


def read(model: FarspanForCausalLM, ids: Tensor, cache: FarspanCache, sizes: tuple[int, ...]) -> Tensor:
    """The logits of a text that is read in pieces."""
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_are_independent(mix: str, copied: Callable[[FarspanCache], FarspanCache]) -> None:
    model, ids = tiny(mix).double(), text()
    other = torch.cat((ids[:, :8], ids[:, 8:].flip(1)), dim=1)
    with torch.no_grad():
        expected = [model(both, use_cache=False).logits[:, 8:] for both in (ids, other)]
        cache = model.new_cache(12)
        read(model, ids[:, :8], cache, (6, 1, 1))
        fork = copied(cache)
        for branch, both, logits in zip((fork, cache), (other, ids), reversed(expected), strict=True):
            assert_close(read(model, both[:, 8:], branch, (1, 1, 2)), logits, tolerances.FLOAT64)


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_modes_may_change(mix: str, first: str, second: str) -> None:
    model, ids = tiny(mix).double(), text()
    begin: AbstractContextManager[None] = MODES[first]()
    go_on: AbstractContextManager[None] = MODES[second]()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 8:]
    cache = model.new_cache(12)
    with begin:
        read(model, ids[:, :8], cache, (6, 1, 1))
    with go_on:
        got = read(model, ids[:, 8:], cache, (1, 1, 2))
    assert_close(got.detach(), expected, tolerances.FLOAT64)


def test_tokens_that_are_none_change_nothing(mix: str) -> None:
    model, ids = tiny(mix).double(), text()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = read(model, ids, model.new_cache(12), (0, 5, 0, 7))
    assert_close(got, expected, tolerances.FLOAT64)


@pytest.mark.parametrize("sizes", [(6,), (1,), (1, 3)])
def test_gradients_of_new_tokens(mix: str, sizes: tuple[int, ...]) -> None:
    """Against a difference quotient in a random direction of all parameters; what was read before stays as it is."""
    model, ids = tiny(mix).double(), text(8 + sum(sizes))
    with torch.no_grad():
        filled = model.new_cache(16)
        model(ids[:, :8], past_key_values=filled)

    def loss() -> Tensor:
        cache = copy.deepcopy(filled)
        pieces = ids[:, 8:].split(sizes, dim=1)
        losses = [model(piece, past_key_values=cache).logits.square().sum() for piece in pieces]
        return losses[0]  # what is read behind it must not change its graph

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    ends = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            ends.append(loss())
    assert slope != 0
    assert_close((ends[0] - ends[1]) / 2e-6, slope, tolerances.GRADCHECK)


def test_steps_in_place_leave_what_autograd_has_saved(mix: str) -> None:
    model, ids = tiny(mix), torch.randint(1, 61, (2, 12))
    found = []
    for stepping in (False, True):
        model.zero_grad()
        cache = model.new_cache(12)
        costs = [
            model(part, past_key_values=cache).logits.square().sum() for part in ids[:, :9].split([5, 3, 1], dim=1)
        ]
        if stepping:
            with torch.no_grad():
                for token in ids[:, 9:].split(1, dim=1):
                    model(token, past_key_values=cache)
        torch.stack(costs).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for without, with_steps in zip(*found, strict=True):
        torch.testing.assert_close(with_steps, without, rtol=0, atol=0)


def test_a_cache_of_a_failed_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("hybrid"), text()
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[-1], "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, 5:], past_key_values=cache)
        with pytest.raises(ConfigError, match="torn: a forward pass that wrote to it failed half-way"):
            model(ids[:, 5:], past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)


def test_a_cache_of_another_model_is_refused() -> None:
    ids, cache = text(), tiny("softmax").new_cache()
    with pytest.raises(ConfigError, match=r"of another model \(of softmax; this one is of metala\)"):
        tiny("metala")(ids, past_key_values=cache)


def test_layers_that_are_computed_twice_refuse_a_cache(mix: str) -> None:
    model, ids = tiny(mix).train(), text()
    recompute_activations(model)
    with pytest.raises(ConfigError, match="does not go with gradient checkpointing"):
        model(ids, past_key_values=model.new_cache(), labels=ids)
    with torch.no_grad():  # as `generate` does: nothing is computed twice
        cache = model.new_cache(12)
        got = read(model, ids, cache, (6, 1, 5))
        torch.testing.assert_close(got, model.eval()(ids).logits, atol=tolerances.FLOAT32, rtol=0)
