"""Whole models through the kernels, chosen as on a GPU: they generate and learn what they do in PyTorch."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan import FarspanForCausalLM
from farspan.models.decoding import decode
from farspan.ops import _backend
from farspan.ops.dynamic_mask import limits
from tests import tolerances
from tests.models.conftest import tiny
from tests.ops.checks import assert_close


def serve(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the kernels serve whatever they can, and returns the list of what they will have served."""
    resolve, served = _backend.resolve, []

    def chosen(
        op: str, backend: str, tensors: Sequence[Tensor | None], *, beyond_kernels: str | None = None
    ) -> Callable[..., Any]:
        given = [tensor for tensor in tensors if tensor is not None]
        if backend == "auto" and op in _backend._kernels and not (beyond_kernels or _backend._limits[op](given)):
            served.append(op)
            backend = "triton"
        return resolve(op, backend, tensors, beyond_kernels=beyond_kernels)

    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)
    monkeypatch.setattr(limits, "SHORT", 0)
    for module in list(sys.modules.values()):
        if module.__name__.startswith("farspan.") and getattr(module, "resolve", None) is resolve:
            monkeypatch.setattr(module, "resolve", chosen)
    return served


def results(model: FarspanForCausalLM) -> tuple[list[list[int]], dict[str, Tensor]]:
    """The continuation of a padded prompt, and the loss on it with all gradients."""
    ids = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    tokens = [token.tolist() for token in decode(model.eval(), ids, attention_mask=mask, max_new_tokens=2)]
    model.train().zero_grad()
    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return tokens, {"loss": loss.detach()} | gradients


@pytest.mark.parametrize(
    "mix", ["collinear", "cosine_gpt", "dilated", "dilated_nested", "dynamic_mask", "hybrid", "metala", "ssd", "window"]
)
def test_models_do_what_they_do_in_pytorch(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(mix)
    tokens, want = results(model)
    served = serve(monkeypatch)
    again, got = results(model)
    assert again == tokens
    assert want.keys() == got.keys()
    largest = torch.stack([x.abs().max() for x in want.values()]).max()
    for name, x in want.items():
        assert_close(got[name], x, tolerances.FLOAT32, name, largest=largest)
    assert any(op.endswith("_step") for op in served)


@pytest.mark.parametrize("mix", ["collinear", "dilated", "dynamic_mask", "dynamic_mask_window", "softmax", "ssd"])
def test_a_batch_of_no_rows_is_served(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(mix, num_hidden_layers=1)
    served = serve(monkeypatch)
    ids = torch.zeros(0, 9, dtype=torch.long)
    model(ids).logits.sum().backward()
    assert served
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        (layer,) = cache.layers
        if layer.can_pin:
            layer.pin(1)
            served.clear()
            assert model(ids[:, :1], past_key_values=cache.taken()).logits.shape == (0, 1, 61)
            assert any(op.endswith("_step") for op in served)
