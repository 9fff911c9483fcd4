"""The short convolution: its taps, its state and its documents, forward and gradient."""

import importlib
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from farspan.errors import ConfigError
from farspan.ops import short_convolution
from tests import tolerances
from tests.ops.checks import Named, assert_close, assert_same, boundaries, cast, outputs_and_gradients
from tests.ops.recording import NODES, CheckedNodes

shifted = importlib.import_module("farspan.ops.short_convolution.torch")


def make(length: int, taps: int = 4, *, batch: int = 2, sequences: int | None = None) -> Named:
    """Random inputs with five channels."""
    generator = torch.Generator().manual_seed(length)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    state = randn(batch if sequences is None else sequences, 5, taps)
    return {"x": randn(batch, length, 5), "weight": randn(5, taps), "bias": randn(5), "initial_state": state}


def convolve(backend: str, **options: object) -> partial:
    return partial(short_convolution, output_final_state=True, backend=backend, **options)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_a_grouped_convolution(backend: str) -> None:
    x = make(9)
    want = F.conv1d(F.pad(x["x"].mT, (3, 0)), x["weight"].unsqueeze(1), x["bias"], groups=5).mT
    out, state = convolve(backend, activation=None)(**x | {"initial_state": None})
    assert_close(out, want, tolerances.FLOAT64)
    assert torch.equal(state, x["x"][:, -4:].mT)
    out, _ = convolve(backend)(**x | {"initial_state": None})
    assert_close(out, F.silu(want), tolerances.FLOAT64)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 200])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_torch_matches_reference(
    length: int, taps: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shifted.STRETCH, False, 64 * 5)
    x = make(length, taps)
    want = outputs_and_gradients(convolve("reference", activation=activation), x)
    assert_same(outputs_and_gradients(convolve("torch", activation=activation), x), want, tolerances.FLOAT64)
    got = outputs_and_gradients(convolve("torch", activation=activation), cast(x, torch.float32))
    assert_same(got, want, tolerances.FLOAT32)


@pytest.mark.parametrize("lengths", [[3, 0, 1, 30, 2], [0, 0], [0, 7]])
def test_packed_documents_equal_separate_ones(lengths: list[int]) -> None:
    x = make(sum(lengths), batch=1, sequences=len(lengths))
    cu_seqlens = boundaries(lengths)
    want = outputs_and_gradients(convolve("reference", cu_seqlens=cu_seqlens), x)
    assert_same(outputs_and_gradients(convolve("torch", cu_seqlens=cu_seqlens), x), want, tolerances.FLOAT64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_equal_finite_differences(backend: str) -> None:
    x = make(5)
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    assert torch.autograd.gradcheck(lambda *t: convolve(backend)(**dict(zip(x, t, strict=True))), leaves)


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 12])
def test_a_carried_state_continues_the_sequence(cut: int) -> None:
    x = make(12)
    inputs, state = x.pop("x"), x.pop("initial_state")
    want, final = convolve("torch")(x=inputs, initial_state=state, **x)
    head, state = convolve("torch")(x=inputs[:, :cut], initial_state=state, **x)
    tail, state = convolve("torch")(x=inputs[:, cut:], initial_state=state, **x)
    assert_close(torch.cat([head, tail], dim=1), want, tolerances.FLOAT64)
    assert torch.equal(state, final)


def test_future_does_not_change_past() -> None:
    x = make(12)
    before, _ = convolve("torch")(**x)
    x["x"][:, 7:] += 1
    after, _ = convolve("torch")(**x)
    assert torch.equal(before[:, :7], after[:, :7])


def test_sixteen_bit_inputs_accumulate_in_float32() -> None:
    x = cast(make(100), torch.bfloat16)
    want = outputs_and_gradients(convolve("reference"), cast(x, torch.float64))
    got = outputs_and_gradients(convolve("torch"), x)
    assert got["out"].dtype == got["d_weight"].dtype == torch.bfloat16
    assert_same(got, want, tolerances.BFLOAT16)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation='gelu' is not known. Accepted: 'silu', None"):
        convolve("auto", activation="gelu")(**make(3))


def test_nodes_are_what_they_declare() -> None:
    with CheckedNodes():
        outputs_and_gradients(convolve("torch"), make(9))
    assert {"farspan::short_convolution", "farspan::short_convolution_gradient"} <= NODES
