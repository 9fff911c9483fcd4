"""SwiGLU's product of whole tensors and of slices of one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.errors import ShapeError
from farspan.ops import _backend
from farspan.ops.swiglu.api import swiglu
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED

BACKEND = "triton" if INTERPRETED else "torch"


def gradients(out: Tensor, inputs: tuple[Tensor, ...], d_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, d_out.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if INTERPRETED else [torch.float64])
@pytest.mark.parametrize("how", ["whole", "slices", "transposed"])
def test_product(how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if how == "whole":
        gate, up = draw(2, 3, 700), draw(2, 3, 700)
    elif how == "slices":
        gate, up = draw(2, 3, 1400).split(700, dim=-1)
    else:
        gate, up = draw(3, 2, 700).transpose(0, 1), draw(2, 700, 3).transpose(1, 2)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    got = swiglu(gate, up, backend=BACKEND)
    want = F.silu(gate.double()) * up.double()
    d_out = draw(*got.shape)
    pairs = zip((got, *gradients(got, (gate, up), d_out)), (want, *gradients(want, (gate, up), d_out)), strict=True)
    tolerance = {torch.float64: tolerances.FLOAT64, torch.float32: tolerances.FLOAT32, torch.float16: 2e-3}[dtype]
    for ours, exact in pairs:
        assert ours.dtype == dtype
        assert_close(ours, exact, tolerance)


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)
    inputs = [torch.randn(1, 2, 5).requires_grad_() for _ in range(2)]
    found = []
    for out in (swiglu(*inputs, backend=BACKEND), F.silu(inputs[0]) * inputs[1]):
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, tolerances.FLOAT32)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs the kernels on a CPU")
@pytest.mark.parametrize(("channels", "row"), [(32, 64), (32, 65), (700, 1400)])
def test_what_is_launched_has_been_compiled_ahead(channels: int, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.ops.swiglu import triton as kernels
    from tests.ops.recording import rehearsed_and_launched

    rehearsed, launched = rehearsed_and_launched(kernels, monkeypatch)
    both = torch.randn(2, 3, row, requires_grad=True)
    out = kernels.swiglu_triton(both[..., :channels], both[..., -channels:])
    out.backward(torch.ones_like(out))
    assert len(launched) == 2, "forward and gradient"
    assert rehearsed == launched


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs the kernels on a CPU")
def test_kernels_are_one_graph_when_compiled() -> None:
    from farspan.ops.swiglu.triton import swiglu_triton

    def square(x: Tensor) -> Tensor:
        return swiglu_triton(*x.split(32, dim=-1)).square()

    x, found = torch.randn(2, 5, 64, requires_grad=True), []
    for call in (torch.compile(square, fullgraph=True, backend="aot_eager"), square):
        out = call(x)
        found.append((out, *gradients(out, (x,), torch.ones_like(out))))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel")
def test_shapes_have_to_agree() -> None:
    with pytest.raises(ShapeError, match="up has shape"):
        swiglu(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
