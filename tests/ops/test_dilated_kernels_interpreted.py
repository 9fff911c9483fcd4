"""The joining kernels of dilated attention in Triton's interpreter, with formed scores where a GPU has cuDNN."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farspan.nn.positions import xpos_rates
from farspan.ops import dilated_attention
from farspan.ops.dilated import cudnn
from farspan.ops.dilated import triton as kernels
from farspan.ops.dilated.patterns import DilatedSettings
from farspan.ops.dilated.rotation import turn_factors, turn_pair_torch
from farspan.ops.dilated.rotation_triton import turn_pair_triton
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.recording import rehearsed_and_launched

LONGNET = [(8, 1), (16, 2), (32, 4), (32, 12)]
CASES = {
    "longnet": (40, 12, LONGNET, 1),
    "ragged": (75, 4, [(9, 1), (20, 3), (70, 6)], 2),
    "one pattern": (40, 3, [(16, 1)], 1),
    "uncovered rows": (50, 2, [(16, 4), (50, 7)], 2),
    "more dilation than heads": (33, 2, [(11, 1), (33, 9)], 1),
    "batch side by side": (32, 5, [(8, 1), (16, 2)], 3),
    "twice the same": (24, 2, [(8, 1), (8, 1), (24, 2)], 1),
    "one token": (1, 2, [(8, 1), (24, 2)], 2),
}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "SHORTEST", 1 << 30)
    monkeypatch.setattr(kernels, "cudnn_serves", lambda *_: True)


def results(call: object, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = call(*leaves)  # type: ignore[operator]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def compare(tensors: list[Tensor], patterns: list[tuple[int, int]], **options: object) -> None:
    segments, dilations = (list(numbers) for numbers in zip(*patterns, strict=True))
    want = results(
        lambda q, k, v: dilated_attention(
            q, k, v, segment_lengths=segments, dilations=dilations, backend="reference", **options
        ),
        tensors,
    )
    settings = DilatedSettings(tuple(patterns), scale=tensors[0].shape[-1] ** -0.5, **options)
    got = results(
        lambda q, k, v: kernels.dilated_attention_triton(q, k, v, settings),
        [x.float() for x in tensors],
    )
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(a, b, tolerances.FLOAT32, name, largest=torch.ones(()))


def make(length: int, heads: int, batch: int, groups: int | None = None, width: int = 6) -> list[Tensor]:
    return [torch.randn(batch, length, h, width).double() for h in (heads, groups or heads, groups or heads)]


@pytest.mark.parametrize("rule", ["mod", "block", "none"])
@pytest.mark.parametrize("case", CASES)
def test_boxes_match_reference(case: str, rule: str) -> None:
    length, heads, patterns, batch = CASES[case]
    compare(make(length, heads, batch), patterns, head_offset=rule, causal=case != "ragged")


@pytest.mark.parametrize("case", CASES)
def test_what_is_launched_has_been_compiled_ahead(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length, heads, patterns, batch = CASES[case]
    rehearsed, launched = rehearsed_and_launched(kernels, monkeypatch)
    settings = DilatedSettings(tuple(patterns), head_offset="mod")
    leaves = [x.float().requires_grad_() for x in make(length, heads, batch)]
    kernels.dilated_attention_triton(*leaves, settings).sum().backward()
    assert launched, "nothing was launched"
    assert launched <= rehearsed, sorted(str(x) for x in launched - rehearsed)


@pytest.mark.parametrize("tokens", [1, 40])
def test_stretches_do_not_show(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FORWARD", tokens * 4 * 6)
    monkeypatch.setattr(kernels, "BACKWARD", tokens * 4 * 6)
    compare(make(75, 4, 1), [(8, 1), (16, 4)])
    compare(make(64, 4, 2), [(8, 1), (16, 4)], causal=False)


@pytest.mark.parametrize("rule", ["mod", "block"])
def test_detached_mixture_matches_reference(rule: str) -> None:
    compare(make(50, 4, 1), [(10, 1), (30, 3)], head_offset=rule, detach_mixture_weights=True)


@pytest.mark.parametrize("detach", [False, True])
def test_rotations_match_reference(detach: bool) -> None:
    frequencies, growth = xpos_rates(6, 64, 40)
    rates = {"frequencies": frequencies, "growth": growth}
    compare(make(90, 4, 2), [(10, 1), (40, 3)], detach_mixture_weights=detach, **rates)


@pytest.mark.parametrize("window", [16, 200])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, tolerances.FLOAT32), (torch.float16, 2e-3)], ids=str)
def test_turned_pairs_match_the_formula(window: int, dtype: torch.dtype, limit: float) -> None:
    q, k = torch.randn(2, 45, 5, 6).to(dtype), torch.randn(2, 45, 1, 6).to(dtype)
    factors = turn_factors(torch.arange(90).view(2, 45) % 45, window, *xpos_rates(6, 64, window))
    weights = torch.randn(2, 45, 6, 6)

    def results(turn: Callable[..., tuple[Tensor, Tensor]], *pair: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in pair]
        turned = turn(*leaves, *factors)
        whole = torch.cat(turned, dim=2)
        return [whole.detach(), *torch.autograd.grad((whole * weights.to(whole.dtype)).sum(), leaves)]

    for got, want in zip(
        results(turn_pair_triton, q, k), results(turn_pair_torch, q.double(), k.double()), strict=True
    ):
        assert_close(got, want, limit)


def test_gradients_by_rows_with_few_keys_are_rounded_once() -> None:
    dtype = torch.float16  # the interpreter cuts bfloat16 off instead of rounding it
    q, k, v, weight = (torch.randn(2, 32, 4, 16).to(dtype) for _ in range(4))
    leaves, exact = ([x.to(kind).requires_grad_() for x in (q, k, v)] for kind in (dtype, torch.float64))
    patterns = ((32, 1), (32, 2), (32, 4))
    out = kernels.dilated_attention_triton(*leaves, DilatedSettings(patterns, scale=0.25))
    segments, dilations = zip(*patterns, strict=True)
    want = dilated_attention(*exact, segment_lengths=segments, dilations=dilations, scale=0.25, backend="reference")
    found = torch.autograd.grad(out, leaves, weight)
    for name, a, b in zip(("dq", "dk", "dv"), found, torch.autograd.grad(want, exact, weight.double()), strict=True):
        rounding = b.abs() * torch.finfo(dtype).eps / 2
        excess = ((a.double() - b).abs() - rounding).amax() / b.abs().amax()
        assert excess <= tolerances.FLOAT32_STEP, f"{name}: {excess:.3g} of the largest entry beyond one rounding"


def test_shared_key_heads_match_reference() -> None:
    compare(make(40, 4, 1, groups=2), [(10, 1), (40, 3)])


def test_nothing_in_nothing_out() -> None:
    q = torch.zeros(2, 0, 3, 8)
    assert kernels.dilated_attention_triton(q, q, q, DilatedSettings(((4, 1),))).shape == q.shape
