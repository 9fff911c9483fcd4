"""The Triton kernels, run by Triton's interpreter on the CPU, against the references, forward and gradient.

`TRITON_INTERPRET=1 pytest tests/ops/test_kernels_interpreted.py`: the mode is fixed where kernels are defined, so they
need a process of their own. Chunks of 16 rows keep them fast; races, layouts and 16-bit products are for a real GPU.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from farspan.ops.gated_linear import launches as kernels
from farspan.ops.gated_linear import plan
from farspan.ops.gated_linear.triton import gated_linear_attention_triton
from farspan.ops.metala.triton import metala_attention_triton
from tests import tolerances
from tests.ops import test_gated_linear, test_metala
from tests.ops.checks import assert_close, assert_same, boundaries, cast, outputs_and_gradients

# Interpreted products of infinite entries, which the kernels select away.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")

REFERENCE = test_gated_linear.attend("reference")
OPTIONS = {
    "scale": 5**-0.5,
    "decay_normalizer": 16.0,
    "augmentation_inside": True,
    "normalize": True,
    "norm_eps": 1e-5,
    "padding_mask": None,
    "cu_seqlens": None,
}


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "NARROWEST", 16)
    kernels._device_tiles.cache_clear()
    kernels._constants.cache_clear()
    monkeypatch.setattr(plan, "PROGRAMS", 1)
    monkeypatch.setattr(plan, "SEGMENT", (1, 2))


def gated(cu_seqlens: Tensor | None = None) -> partial:
    return partial(gated_linear_attention_triton, scale=5**-0.5, cu_seqlens=cu_seqlens)


def metala(**options: object) -> partial:
    return partial(metala_attention_triton, **OPTIONS | options)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("length", [1, 16, 37, 75])
def test_gated_linear_matches_reference(length: int, decay: str) -> None:
    x = test_gated_linear.make(length, decay, batch=1)
    want = outputs_and_gradients(REFERENCE, x)
    assert_same(outputs_and_gradients(gated(), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("decay", ["forgetful", "extreme", "zero"])
def test_extreme_decays_match_reference(decay: str) -> None:
    x = test_gated_linear.make(18, decay, batch=1, heads=1)
    want = outputs_and_gradients(REFERENCE, x)
    want["d_log_decay"] = want["d_log_decay"].nan_to_num()
    assert_same(outputs_and_gradients(gated(), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_float16_takes_the_fast_sums(decay: str) -> None:
    x = cast(test_gated_linear.make(40, decay, batch=1), torch.float16)
    x["initial_state"] = x["initial_state"].float()
    want = outputs_and_gradients(REFERENCE, cast(x, torch.float64))
    got = outputs_and_gradients(gated(), x)
    assert got["out"].dtype == torch.float16
    assert_same(got, want, tolerances.BFLOAT16)


@pytest.mark.parametrize("lengths", [[20, 0, 1, 34], [0, 0, 17], [48, 0]])
def test_packed_documents_match_reference(lengths: list[int]) -> None:
    x = test_gated_linear.make(sum(lengths), batch=1, sequences=len(lengths))
    cu_seqlens = boundaries(lengths)
    want = outputs_and_gradients(test_gated_linear.attend("reference", cu_seqlens=cu_seqlens), x)
    assert_same(outputs_and_gradients(gated(cu_seqlens), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_batch_rows_do_not_mix() -> None:
    x = test_gated_linear.make(21, batch=3)
    want = outputs_and_gradients(REFERENCE, x)
    assert_same(outputs_and_gradients(gated(), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_empty_sequences_return_the_initial_state() -> None:
    x = cast(test_gated_linear.make(0), torch.float32)
    out, state = gated()(**x)
    assert out.shape == (2, 0, 2, 7)
    assert torch.equal(state, x["initial_state"])


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": False, "augmentation_inside": False}, {"norm_eps": 1e-2, "decay_normalizer": 4.0}],
)
@pytest.mark.parametrize("length", [1, 50])
def test_metala_matches_reference(length: int, options: dict[str, object]) -> None:
    x = test_metala.make(length, batch=1)
    want = outputs_and_gradients(test_metala.attend("reference", **options), x)
    assert_same(outputs_and_gradients(metala(**options), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_metala_without_augmentation_and_with_own_key() -> None:
    x = test_metala.make(20, batch=1)
    x["augmentation"] = None
    want = outputs_and_gradients(test_metala.attend("reference"), x)
    assert_same(outputs_and_gradients(metala(), cast(x, torch.float32)), want, tolerances.FLOAT32)
    x["key"] = torch.randn_like(x["q"])
    want = outputs_and_gradients(test_metala.attend("reference"), x)
    assert_same(outputs_and_gradients(metala(), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_metala_extreme_gates_match_reference() -> None:
    x = test_metala.make(17, batch=1)
    x["gate_logits"] = torch.tensor([-1e3, -50.0, 0.0, 50.0, 1e3]).double()[torch.randint(5, x["q"].shape)]
    options = {"decay_normalizer": 1.0}
    want = outputs_and_gradients(test_metala.attend("reference", **options), x)
    assert_same(outputs_and_gradients(metala(**options), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_padding_neither_decays_nor_writes() -> None:
    x = cast(test_metala.make(20, batch=1), torch.float32)
    keep = torch.rand(1, 20) < 0.6
    out, state = metala(padding_mask=keep)(**x)
    want, want_state = test_metala.attend("reference", padding_mask=keep)(**x)
    assert_close(out[keep], want[keep], tolerances.FLOAT32)
    assert_close(state, want_state, tolerances.FLOAT32)
