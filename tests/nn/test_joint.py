"""Joined projections give what separate ones do, hold nothing twice, and leave the model as it was."""

import copy

import pytest
import torch
from torch import nn

from farspan.models.decoding import decode
from farspan.nn.joint import joined
from tests.models.conftest import tiny


@pytest.mark.parametrize("mix", ["metala", "softmax", "hybrid"])
def test_joined_model_computes_the_same(mix: str) -> None:
    model, ids = tiny(mix), torch.randint(1, 61, (2, 9))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        cache, other = model.new_cache(), model.new_cache()
        plain = [model(piece, past_key_values=cache).logits for piece in ids.split([6, 1, 1, 1], dim=1)]
        with joined(model):
            together = [model(piece, past_key_values=other).logits for piece in ids.split([6, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(together, dim=1), torch.cat(plain, dim=1), atol=1e-5, rtol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_weights_are_held_once_while_joined_and_apart_afterwards() -> None:
    model = tiny("metala")
    feed_forward = model.model.blocks[0].feed_forward
    gate, up = feed_forward.gate_proj.weight, feed_forward.up_proj.weight

    def together() -> bool:
        return gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()

    with joined(model):
        assert together()
        assert feed_forward.joint is not None
    assert not together()
    assert feed_forward.joint is None
    assert gate.untyped_storage().nbytes() == gate.nbytes


def test_a_model_that_has_generated_in_inference_mode_can_be_trained() -> None:
    model, ids = tiny("metala"), torch.randint(1, 61, (2, 9))
    with torch.inference_mode():
        assert len(list(decode(model, ids, max_new_tokens=3))) == 3
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(ids, labels=ids).loss.backward()


def test_what_is_no_plain_linear_map_stays_apart() -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny("metala")
    feed_forward = model.model.blocks[0].feed_forward
    feed_forward.up_proj = Adapted(32, 48, bias=False)
    with joined(model):
        assert feed_forward.joint is None
        assert model.model.blocks[1].feed_forward.joint is not None


def test_offloaded_maps_stay_apart() -> None:
    model = tiny("metala")
    feed_forward = model.model.blocks[0].feed_forward
    feed_forward.gate_proj.to("meta")
    feed_forward.up_proj.to("meta")
    with joined(model):
        assert feed_forward.joint is None
        assert model.model.blocks[1].feed_forward.joint is not None


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_maps_with_a_hook_are_called(hook: str) -> None:
    model, ids, calls = tiny("metala"), torch.randint(1, 61, (2, 9)), []
    getattr(model.model.blocks[0].feed_forward.up_proj, hook)(lambda *_: calls.append(1))
    assert len(list(decode(model, ids, max_new_tokens=4))) == len(calls) == 4


def test_an_error_inside_separates_them_too() -> None:
    model = tiny("metala")
    with pytest.raises(KeyError), joined(model):
        raise KeyError
    assert all(getattr(module, "joint", None) is None for module in model.modules())


@pytest.mark.parametrize(
    "mix", ["softmax", "metala", "collinear_strict", "cosine_gpt", "dilated_xpos", "dynamic_mask_query"]
)
def test_a_model_trains_while_a_text_is_open(mix: str) -> None:
    model, ids = tiny(mix), torch.randint(1, 61, (2, 9))
    model(ids, labels=ids).loss.backward()
    want = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    steps = decode(model, ids, max_new_tokens=5)
    next(steps), next(steps)
    assert any(getattr(module, "joint", None) is not None for module in model.modules())
    model(ids, labels=ids).loss.backward()
    for parameter, gradient in zip(model.parameters(), want, strict=True):
        assert torch.equal(parameter.grad, gradient)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        changed = model(ids).logits
        steps.close()
        torch.testing.assert_close(changed, model(ids).logits, atol=1e-5, rtol=1e-4)
