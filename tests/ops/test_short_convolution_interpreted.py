"""The short convolution's kernels in Triton's interpreter: outputs, states and gradients as the reference's."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from farspan.ops import short_convolution
from farspan.ops.short_convolution import triton
from farspan.ops.short_convolution.triton import short_convolution_triton
from tests import tolerances
from tests.ops.checks import assert_same, boundaries, cast, outputs_and_gradients
from tests.ops.test_short_convolution import make

FLOAT16 = 2e-3  # inputs and outputs of 11 bits: one rounding of each output


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of tokens a program, so that programs meet inside of the sequences."""
    monkeypatch.setattr(triton, "TILE", (8, 64))
    monkeypatch.setattr(triton, "GRADIENT_TILE", (8, 64))
    monkeypatch.setattr(triton, "WALK", 16)
    monkeypatch.setattr(triton, "_constants", triton._constants.__wrapped__)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (16, 2), (33, 4), (70, 1), (70, 3)])
def test_rows_match_reference(length: int, taps: int, activation: str | None, state: bool, bias: bool) -> None:
    x = {n: t for n, t in make(length, taps).items() if (state or n != "initial_state") and (bias or n != "bias")}
    check(x, activation=activation)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 30, 2], [17, 16, 15, 40], [0, 7], [2, 0]])
def test_packed_documents_match_reference(lengths: list[int], state: bool) -> None:
    x = make(sum(lengths), batch=1, sequences=len(lengths))
    check({n: t for n, t in x.items() if state or n != "initial_state"}, cu_seqlens=boundaries(lengths))


def test_parameters_that_are_slices_are_read_as_they_are() -> None:
    x, given = make(20)["x"].float(), weights(make(20))
    slices = [torch.stack((t, t + 1), dim=-1)[..., 0].requires_grad_() for t in given]
    whole = [t.clone().requires_grad_() for t in given]
    (got, _), (want, _) = (short_convolution_triton(x, *parameters, **options()) for parameters in (slices, whole))
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), slices), torch.autograd.grad(want.sum(), whole), strict=True):
        assert torch.equal(a, b)


def test_slices_of_a_wider_product_are_read_in_place() -> None:
    x = make(20)
    wide = torch.randn(2, 20, 12)
    got, _ = short_convolution_triton(wide[..., 3:8], *weights(x), **options())
    want, _ = short_convolution_triton(wide[..., 3:8].contiguous(), *weights(x), **options())
    assert torch.equal(got, want)


def test_rows_of_whole_16_byte_blocks_match_reference() -> None:
    x = make(37)
    channels = {"x": 2, "weight": 0, "bias": 0, "initial_state": 1}
    check({name: tensor.repeat_interleave(16, dim=channels[name]) for name, tensor in x.items()})


def test_activations_that_are_recomputed_give_the_same_gradients() -> None:
    x = make(9)
    again = partial(checkpoint, kernels, use_reentrant=False)
    got = outputs_and_gradients(lambda **given: again(*given.values()), {n: x[n] for n in ("x", "weight", "bias")})
    assert_same(got, outputs_and_gradients(kernels, {n: x[n] for n in ("x", "weight", "bias")}), tolerances.FLOAT32)


def test_float16_sums_in_float32() -> None:
    x = cast(make(40), torch.float16)
    run = partial(short_convolution, backend="reference", output_final_state=True)
    want = outputs_and_gradients(run, cast(x, torch.float64))
    assert_same(outputs_and_gradients(kernels, x), want, FLOAT16)


def weights(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return x["weight"].float(), x["bias"].float()


def options(**changed: object) -> dict[str, object]:
    return {"activation": "silu", "initial_state": None, "cu_seqlens": None} | changed


def kernels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **changed: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return short_convolution_triton(x, weight, bias, **options(**changed))


def check(x: dict[str, torch.Tensor], **changed: object) -> None:
    run = partial(short_convolution, backend="reference", output_final_state=True, **changed)
    want = outputs_and_gradients(run, x)
    got = outputs_and_gradients(partial(kernels, **changed), cast(x, torch.float32))
    assert_same(got, want, tolerances.FLOAT32)
