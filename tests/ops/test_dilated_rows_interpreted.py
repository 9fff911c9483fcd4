"""The kernels of dilated attention that read rows in place, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from farspan.nn.positions import alibi_bias, relative_position_bias, xpos_rates
from farspan.ops import dilated_attention
from farspan.ops.dilated import rows
from farspan.ops.dilated import triton as kernels
from farspan.ops.dilated.patterns import DilatedSettings
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.recording import rehearsed_and_launched

PATTERNS = [(19, 1), (30, 4)]
CASES = {
    "ragged": (45, 3, 1, None),
    "packed": (42, 2, 1, [0, 14, 14, 15, 42]),
    "batch": (21, 2, 2, None),
    "one token": (1, 2, 2, None),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cudnn_serves", lambda *_: False)
    monkeypatch.setattr(rows, "blocks", lambda *_: rows.Blocks(16, 8, 4, 8, 8, 4, 1))
    monkeypatch.setattr(rows, "PROGRAMS", 24)


def make(length: int, heads: int, batch: int, widths: tuple[int, int] = (6, 6), groups: int = 0) -> list[Tensor]:
    groups = groups or heads
    shapes = [(heads, widths[0]), (groups, widths[0]), (groups, widths[1])]
    return [torch.randn(batch, length, *shape).double() for shape in shapes]


def compare(
    tensors: list[Tensor],
    patterns: list[tuple[int, int]] = PATTERNS,
    *,
    bias: Tensor | None = None,
    bounds: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    tolerance: float = tolerances.FLOAT32,
    **options: object,
) -> None:
    """Outputs and all gradients, of the bias too, against the formula in float64."""
    segments, dilations = (list(numbers) for numbers in zip(*patterns, strict=True))
    bounds = [0, tensors[0].shape[1]] if bounds is None else bounds
    packed = torch.tensor(bounds, dtype=torch.int32) if len(bounds) > 2 else None
    tensors = [x.to(dtype) for x in tensors]

    def reference(q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None = None) -> Tensor:
        given = {"segment_lengths": segments, "dilations": dilations, "distance_bias": distance_bias}
        return dilated_attention(q, k, v, **given, cu_seqlens=packed, backend="reference", **options)

    def by_kernels(q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None = None) -> Tensor:
        settings = DilatedSettings(tuple(patterns), scale=q.shape[-1] ** -0.5, distance_bias=distance_bias, **options)
        return kernels.dilated_attention_triton(q, k, v, settings, packed)

    def results(call: object, leaves: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        out = call(*leaves)  # type: ignore[operator]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return [out.detach(), *torch.autograd.grad((out.double() * weight).sum(), leaves)]

    biases = [] if bias is None else [bias]
    want = results(reference, [x.double() for x in (*tensors, *biases)])
    got = results(by_kernels, [*tensors, *(x.float() for x in biases)])
    for name, a, b in zip(("out", "dq", "dk", "dv", "d_bias"), got, want, strict=False):
        assert_close(a, b, tolerance, name, largest=torch.ones(()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ["mod", "block", "none"])
def test_rows_match_reference(case: str, rule: str) -> None:
    length, heads, batch, bounds = CASES[case]
    compare(make(length, heads, batch), bounds=bounds, head_offset=rule, causal=case != "ragged")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["alibi", "relative", "wide", "packed"])
def test_bias_and_its_gradient_match_reference(kind: str, causal: bool) -> None:
    length, heads = 40, 2
    bias = alibi_bias(heads, length)
    if kind == "relative":
        bias = relative_position_bias(torch.randn(8, heads), length, 16, bidirectional=not causal)
    elif kind == "wide":
        bias = torch.randn(heads, 2 * length + 39)
    bounds = [0, 24, 40] if kind == "packed" else None
    compare(make(length, heads, 1), bias=bias, bounds=bounds, causal=causal, detach_mixture_weights=kind == "relative")


@pytest.mark.parametrize("detach", [False, True])
def test_rotations_match_reference(detach: bool) -> None:
    frequencies, growth = xpos_rates(6, 64, 40)
    rates = {"frequencies": frequencies, "growth": growth}
    compare(make(30, 2, 1), bounds=[0, 7, 30], detach_mixture_weights=detach, **rates)
    compare(make(40, 4, 1, groups=2), [(5, 2), (15, 1)], bounds=[0, 33, 40], detach_mixture_weights=detach, **rates)


def test_one_pattern_and_fewer_heads_than_dilations_match_reference() -> None:
    compare(make(40, 3, 1), [(16, 5)])
    compare(make(33, 2, 1), [(11, 1), (33, 9)], detach_mixture_weights=True)


def test_shared_heads_and_other_values_match_reference() -> None:
    compare(make(40, 4, 1, widths=(5, 9), groups=2), [(10, 1), (40, 3)])


def test_half_precision_matches_reference() -> None:
    compare(make(40, 2, 1), bias=alibi_bias(2, 40), dtype=torch.float16, tolerance=tolerances.BFLOAT16)


def test_hidden_keys_do_not_count() -> None:
    bias = torch.zeros(2, 99)
    bias[:, :45] = float("-inf")
    compare(make(40, 2, 1), bias=bias)


def test_sums_without_a_key_are_zero() -> None:
    q, k, v = (x.float() for x in make(20, 2, 1))
    bias = torch.full((2, 39), float("-inf"))
    settings = DilatedSettings(((8, 1), (20, 2)), distance_bias=bias)
    q.requires_grad_()
    out = kernels.dilated_attention_triton(q, k, v, settings)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert not out.any() and not dq.any()


def test_compiled_call_on_packed_documents_is_one_graph() -> None:
    frequencies, growth = xpos_rates(6, 64, 40)
    settings = DilatedSettings(((5, 2), (15, 1)), frequencies=frequencies, growth=growth)
    tensors, cu_seqlens = make(40, 2, 1), torch.tensor([0, 7, 7, 40], dtype=torch.int32)

    def call(*tensors: Tensor) -> Tensor:
        return kernels.dilated_attention_triton(*tensors, settings, cu_seqlens)

    results = []
    for form in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [x.float().requires_grad_() for x in tensors]
        out = form(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, tolerances.FLOAT32)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("patterns", [PATTERNS, PATTERNS[:1]], ids=["several", "one"])
def test_what_is_compiled_ahead_is_what_is_launched(
    patterns: list[tuple[int, int]], detach: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed, launched = rehearsed_and_launched(rows, monkeypatch)
    bias = torch.randn(2, 89).requires_grad_() if biased else None
    leaves = [x.float().requires_grad_() for x in make(45, 2, 1)]
    settings = DilatedSettings(tuple(patterns), distance_bias=bias, detach_mixture_weights=detach)
    out = kernels.dilated_attention_triton(*leaves, settings)
    torch.autograd.grad(out.sum(), [*leaves, *([] if bias is None else [bias])])
    assert rehearsed == launched
    assert launched
