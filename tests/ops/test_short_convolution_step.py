"""A step of the short convolution is one token of the whole, and changes its state in place."""

import pytest
import torch

from farspan.errors import ShapeError
from farspan.ops import _backend
from farspan.ops.short_convolution.api import short_convolution
from farspan.ops.short_convolution.step import short_convolution_step
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if INTERPRETED else [torch.float64])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_steps_are_the_whole(
    activation: str | None, width: int, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)
    backend = "triton" if INTERPRETED else "torch"
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 6, 300, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(300, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(300, 2, generator=generator, dtype=torch.float64).to(dtype)[:, 0] if biased else None
    start = torch.randn(2, 300, width, generator=generator, dtype=torch.float64).to(dtype)
    state = start.clone()
    steps = [
        short_convolution_step(row, weight, state, bias, activation=activation, backend=backend)
        for row in x.split(1, dim=1)
    ]
    want, final = short_convolution(
        x.double(),
        weight.double(),
        None if bias is None else bias.double(),
        activation=activation,
        initial_state=start.double(),
        output_final_state=True,
        backend="reference",
    )
    tolerance = {torch.float64: tolerances.FLOAT64, torch.float32: tolerances.FLOAT32, torch.float16: 2e-3}[dtype]
    assert_close(torch.cat(steps, dim=1), want, tolerance)
    assert state.double().equal(final)


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel")
def test_what_cannot_be_a_step_is_refused() -> None:
    x, weight = torch.zeros(2, 2, 3), torch.zeros(3, 4)
    with pytest.raises(ShapeError, match=r"T=1 \(from a step\)"):
        short_convolution_step(x, weight, torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match=r"contiguous tensor of torch\.float32"):
        short_convolution_step(x[:, :1], weight, torch.zeros(2, 3, 4).double())
    with pytest.raises(ShapeError, match="contiguous"):
        short_convolution_step(x[:, :1], weight, torch.zeros(2, 4, 3).transpose(1, 2))
