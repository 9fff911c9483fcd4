"""The kernels of dynamic mask attention in Triton's interpreter, against the definition, forward and gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from farspan.ops.dynamic_mask import triton as kernels
from farspan.ops.dynamic_mask.expiry import expiry
from farspan.ops.dynamic_mask.reference import Selection, dynamic_mask_attention_reference
from tests import tolerances
from tests.ops.checks import assert_close, boundaries
from tests.ops.recording import rehearsed_and_launched
from tests.ops.test_dynamic_mask import make


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"ROWS": 16, "LANES": 16, "ORDERED": 8, "PLACES": 32, "NARROWEST": 16}.items():
        monkeypatch.setattr(kernels, name, size)


def compare(
    tensors: list[Tensor], dtype: torch.dtype = torch.float32, tolerance: float = tolerances.FLOAT32, **options: object
) -> None:
    selection, results = Selection(**options), []
    rounded = [x.detach().to(dtype) for x in tensors[:3]] + [tensors[3].detach().float()]
    cotangent = torch.randn(*tensors[0].shape[:3], tensors[2].shape[-1], dtype=torch.float64).to(dtype)
    for call in (dynamic_mask_attention_reference, kernels.dynamic_mask_attention_triton):
        wide = call is dynamic_mask_attention_reference
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in rounded]
        out = call(*leaves, scale=0.7, selection=selection)
        results.append([out.detach(), *torch.autograd.grad((out * cotangent.to(out.dtype)).sum(), leaves)])
    want, got = results
    for name, a, b in zip(("out", "dq", "dk", "dv", "d_bias"), got, want, strict=True):
        assert_close(a, b, tolerance, name, largest=torch.ones(()))


@pytest.mark.parametrize("keep", [1, 3, 20, 40])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [7, 70])
def test_expiry_equals_the_torch_form(length: int, tied: bool, keep: int) -> None:
    bias = torch.randn(2, length, 3)
    bias = bias.round() if tied else bias
    want = expiry(bias, keep).transpose(1, 2).flatten(0, 1)
    assert torch.equal(kernels.expiry_triton(bias, keep), want)


@pytest.mark.parametrize("trend", [-1.0, 1.0])
def test_expiry_of_falling_and_rising_biases(trend: float) -> None:
    bias = trend * torch.arange(100.0).reshape(1, 100, 1)
    assert torch.equal(kernels.expiry_triton(bias, 30), expiry(bias, 30).transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("lengths", [[20, 0, 3, 41], [0, 9, 60, 0]])
def test_expiry_of_packed_documents(lengths: list[int]) -> None:
    bias, cu_seqlens = torch.randn(1, sum(lengths), 2), boundaries(lengths)
    want = expiry(bias, 5, cu_seqlens).transpose(1, 2).flatten(0, 1)
    assert torch.equal(kernels.expiry_triton(bias, 5, cu_seqlens), want)


@pytest.mark.parametrize("heads", [(4, 2, 2), (3, 3, 1), (2, 1, 2), (4, 1, 1)])
def test_attention_matches_the_definition(heads: tuple[int, int, int]) -> None:
    compare(make(60, heads=heads, batch=1), keep=20)


def test_sixteen_bits_match_the_definition() -> None:
    compare(make(60, heads=(4, 2, 2), batch=1), torch.float16, tolerances.BFLOAT16 / 8, keep=20)


@pytest.mark.parametrize("trend", [-0.5, 0.5])
def test_keys_that_pass_quickly_match_the_definition(trend: float) -> None:
    tensors = make(70, heads=(2, 1, 1), batch=1)
    with torch.no_grad():
        tensors[3] += trend * torch.arange(70).reshape(1, 70, 1)
    compare(tensors, keep=10)


@pytest.mark.parametrize(("queries", "past"), [(20, 37), (3, 50)])
def test_queries_behind_a_past_match_the_definition(queries: int, past: int) -> None:
    compare(make(queries, past, tied=True), keep=18)


def test_rows_beyond_the_programs_of_a_grid_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, programs = kernels.launch, []

    def spy(kernel: object, grid: tuple[int, ...], *others: object) -> None:
        programs.append(grid[1])
        launch(kernel, grid, *others)

    monkeypatch.setattr(kernels, "launch", spy)
    monkeypatch.setattr(kernels, "PROGRAMS", 9)
    mask, ranking = torch.rand(3, 40) < 0.8, torch.randn(3, 40, 2)
    compare(make(40, heads=(4, 2, 2), batch=3), keep=10, key_mask=mask, ranking=ranking)
    assert programs and max(programs) <= 9


def test_padding_and_hidden_keys_match_the_definition() -> None:
    tensors = make(50)
    with torch.no_grad():
        tensors[3][:, 10:30] = float("-inf")
    compare(tensors, keep=12, key_mask=torch.rand(2, 50) < 0.7)


def test_packed_documents_match_the_definition() -> None:
    compare(make(64, batch=1), keep=8, cu_seqlens=boundaries([20, 0, 1, 43]))


@pytest.mark.parametrize("lengths", [[64], [20, 0, 1, 43]])
def test_keys_chosen_once_match_the_definition(lengths: list[int]) -> None:
    compare(make(64, batch=1, tied=True), keep=8, select="topk_global", cu_seqlens=boundaries(lengths))


@pytest.mark.parametrize("window", [7, 21, 50])
def test_keys_of_a_window_match_the_definition(window: int) -> None:
    compare(make(60, tied=True, heads=(4, 2, 1), batch=1), keep=6, window=window)
    compare(make(20, 37, tied=True, batch=1), keep=6, window=window)


def test_windows_of_packed_documents_match_the_definition() -> None:
    compare(make(64, tied=True, batch=1), keep=4, window=10, cu_seqlens=boundaries([20, 0, 1, 43]))


@pytest.mark.parametrize("block_size", [3, 8, 25])
def test_blocks_that_are_kept_whole_match_the_definition(block_size: int) -> None:
    compare(make(60, tied=True, heads=(4, 2, 1), batch=1), keep=10, block_size=block_size)
    compare(make(20, 37, tied=True, batch=1), keep=10, block_size=block_size)
    tensors = make(64, batch=1)
    with torch.no_grad():
        tensors[3][:, 10:30] = float("-inf")
    compare(tensors, keep=6, block_size=block_size, cu_seqlens=boundaries([20, 0, 1, 43]))


FORMS = {
    "plain": {},
    "packed": {"cu_seqlens": boundaries([20, 40])},
    "window": {"window": 20},
    "blocks": {"block_size": 8},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_launched_has_been_compiled_ahead(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed, launched = rehearsed_and_launched(kernels, monkeypatch)
    leaves = [x.detach().float().requires_grad_() for x in make(60, heads=(4, 2, 2), batch=1)]
    selection = Selection(keep=9, **FORMS[form])
    kernels.dynamic_mask_attention_triton(*leaves, scale=0.7, selection=selection).sum().backward()
    assert launched, "nothing was launched"
    assert launched <= rehearsed, sorted(str(x) for x in launched - rehearsed)


def test_another_ranking_matches_the_definition() -> None:
    compare(make(40, batch=1), keep=9, ranking=torch.randn(1, 40, 2))


def test_gradient_of_the_bias_does_not_round_with_the_output() -> None:
    tensors = make(60, heads=(4, 2, 2), batch=1)
    half = [x.detach().half() for x in tensors[:3]] + [tensors[3].detach().float()]
    cotangent, gradients = torch.randn(1, 60, 4, 3).half(), []
    for call, dtype in (
        (dynamic_mask_attention_reference, torch.float64),
        (kernels.dynamic_mask_attention_triton, None),
    ):
        leaves = [(x if dtype is None else x.to(dtype)).requires_grad_() for x in half]
        out = call(*leaves, scale=0.7, selection=Selection(keep=20))
        gradients.append(torch.autograd.grad((out * cotangent.to(out.dtype)).sum(), leaves[3])[0])
    assert_close(gradients[1], gradients[0], tolerances.FLOAT32_STEP, "d_bias")


@pytest.mark.parametrize(("window", "smoothing"), [(None, None), (17, None), (None, 4)])
def test_nodes_are_what_they_declare(window: int | None, smoothing: int | None) -> None:
    q, k, v, bias = (x.detach().float() for x in make(40, heads=(4, 2, 2), batch=1))
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    plan = (bias, bias, None, 40, 2, 9, window, smoothing, 16)
    check(kernels.plan_node, plan)
    inputs = (q, k, v, bias.transpose(1, 2).contiguous(), *kernels.plan_node(*plan))
    check(kernels.attend_node, (*inputs, 0.7))
    found = kernels.attend_node(*inputs, 0.7)
    check(kernels.attend_gradient_node, (torch.randn_like(found[0]), *inputs, *found, 0.7))
