"""The kernels of retrieved experts in Triton's interpreter, against the reference, forward and gradient."""

import pytest
import torch
from torch import Tensor

from farspan.ops import retrieved_experts
from farspan.ops.experts import triton as kernels
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.test_experts import make


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROWS", 4)
    monkeypatch.setattr(kernels, "CHANNELS", 4)


def gradients(call: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if name != "expert_ids"}
    out = call(**leaves, expert_ids=tensors["expert_ids"], activation="gelu")  # type: ignore[operator]
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {"out": out.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize(("tokens", "slots", "experts", "width"), [(9, 6, 5, 7), (1, 1, 3, 4), (5, 9, 30, 10)])
def test_kernels_match_the_reference(tokens: int, slots: int, experts: int, width: int) -> None:
    tensors = make(tokens, slots, experts, width)
    want = gradients(lambda **t: retrieved_experts(**t, backend="reference"), tensors)
    single = {name: x if name == "expert_ids" else x.float() for name, x in tensors.items()}
    got = gradients(kernels.retrieved_experts_triton, single)
    for name in want:
        assert_close(got[name], want[name], tolerances.FLOAT32, name)


def test_experts_nobody_chose_have_no_gradient() -> None:
    tensors = make(4, 3, 9, dtype=torch.float32) | {"expert_ids": torch.full((4, 3), 2)}
    found = gradients(kernels.retrieved_experts_triton, tensors)
    chosen = torch.arange(9) == 2
    assert not found["d_up"][~chosen].any() and found["d_up"][chosen].any()


def test_nothing_in_nothing_out() -> None:
    tensors = make(0, 3, 4, dtype=torch.float32)
    found = gradients(kernels.retrieved_experts_triton, tensors)
    assert found["out"].shape == (0, 5) and not found["d_down"].any()
