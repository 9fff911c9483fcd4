"""Kernels in float16, in Triton's interpreter, against the formulas in wider numbers on the same inputs.

Those whose other tests are in float32 alone; that none is left out is for `test_every_kernel_interpreted.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from farspan.nn.positions import alibi_bias
from farspan.ops import collinear_attention, dilated_attention
from farspan.ops.collinear import step_triton as collinear_step
from farspan.ops.collinear.api import coefficients_by_means
from farspan.ops.collinear.step import collinear_attention_step_torch
from farspan.ops.collinear.triton import collinear_attention_triton, collinear_coefficients_triton
from farspan.ops.cosine.triton import cosine_attention_triton
from farspan.ops.dilated import cudnn
from farspan.ops.dilated import step_triton as dilated_step
from farspan.ops.dilated import triton as boxes
from farspan.ops.dilated.live import live_patterns
from farspan.ops.dilated.patterns import DilatedSettings
from farspan.ops.dilated.step import dilated_attention_step_torch
from farspan.ops.dynamic_mask import scores_triton
from farspan.ops.dynamic_mask.scores import dynamic_mask_scores_torch
from farspan.ops.gated_linear import launches, rows, tiles
from farspan.ops.gated_linear.triton import gated_linear_attention_triton
from farspan.ops.metala.triton import metala_attention_triton
from farspan.ops.softmax import step_triton as softmax_step
from farspan.ops.softmax.step import softmax_attention_step_torch
from farspan.ops.ssd import triton as ssd
from tests import tolerances
from tests.ops import (
    test_collinear_step,
    test_cosine,
    test_dilated_step,
    test_dynamic_mask_scores,
    test_dynamic_mask_step,
    test_kernels_interpreted,
    test_metala,
    test_softmax_step,
    test_ssd,
)
from tests.ops.checks import Named, assert_close, assert_same, outputs_and_gradients
from tests.ops.test_collinear import table

# Inputs are rounded already: one rounding of the result is left, and those of what passes from kernel to kernel.
FLOAT16 = tolerances.BFLOAT16 / 4


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "CHUNK", 16)
    for module in (launches, rows):
        monkeypatch.setattr(module, "NARROWEST", 16)
    monkeypatch.setattr(softmax_step, "SIDE_BY_SIDE", 64)
    monkeypatch.setattr(cudnn, "SHORTEST", 1 << 30)
    monkeypatch.setattr(boxes, "cudnn_serves", lambda *_: True)
    test_kernels_interpreted.forget_sizes()
    yield
    test_kernels_interpreted.forget_sizes()


def agree(kernels: Callable[..., Any], formula: Callable[..., Any], x: Named, wide: Iterable[str] = ()) -> None:
    """Outputs, states and gradients of kernels in float16, and of a formula in float64."""
    x = {name: t if t is None or name in wide else t.half() for name, t in x.items()}
    want = outputs_and_gradients(formula, {name: t if t is None else t.double() for name, t in x.items()})
    got = outputs_and_gradients(kernels, {n: t.float() if t is not None and n in wide else t for n, t in x.items()})
    assert got["out"].dtype == torch.float16
    assert_same(got, want, FLOAT16)


def stateless(call: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda **x: (call(**x), torch.zeros(()))


def test_cosine_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_kernels_interpreted._implementations["cosine_attention"], "torch", cosine_attention_triton)
    kernels, formula = (test_cosine.attend(name) for name in ("torch", "reference"))
    agree(kernels, formula, test_cosine.make(40), {"exponent", "initial_state"})


def test_state_space_duality(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ssd.state_space_duality_triton
    monkeypatch.setitem(test_kernels_interpreted._implementations["state_space_duality"], "torch", call)
    kernels, formula = (test_ssd.attend(name) for name in ("torch", "reference"))
    agree(kernels, formula, test_ssd.make(40, batch=1), {"a", "d", "dt_bias", "initial_state"})


def test_metala_attention() -> None:
    call = test_kernels_interpreted.partial(metala_attention_triton, **test_kernels_interpreted.OPTIONS)
    agree(call, test_metala.attend("reference"), test_metala.make(40, batch=1), {"augmentation", "initial_state"})


def test_outputs_of_heads_wider_than_the_kernels_are_rounded_once() -> None:
    q, k = torch.zeros(2, 1, 1, 1, 256).half()
    ends = torch.tensor([0, 255])  # of the first part and of the last
    q[..., ends], k[..., ends] = 1.0, torch.tensor([1.0, 2**-11 - 1]).half()
    v = torch.full((1, 1, 1, 3), 1 + 2**-10).half()
    out, _ = gated_linear_attention_triton(q, k, v, None, scale=1.0, initial_state=None, cu_seqlens=None)
    assert torch.equal(out, 2**-11 * v)


@pytest.mark.parametrize("form", ["slack", "strict"])
def test_collinear_attention(form: str) -> None:
    x = {"q": torch.randn(1, 40, 4, 8), "t": torch.randn(1, 40, 2, 4), "v": torch.randn(1, 40, 2, 8)}
    cos, sin = (y.float() for y in table(torch.arange(40).unsqueeze(0), 8))
    options = {"causal": True, "window": None, "key_mask": None, "cu_seqlens": None}
    agree(
        stateless(
            lambda q, t, v: collinear_attention_triton(
                q, t, v, cos, sin, form=form, tie="rotary", scale=8**-0.5, **options
            )
        ),
        stateless(lambda q, t, v: collinear_attention(q, t, v, cos, sin, form=form, backend="reference")),
        x,
    )


def test_coefficients() -> None:
    x = {"raw": torch.randn(2, 21, 3, 8)}
    agree(
        stateless(lambda raw: collinear_coefficients_triton(raw, 8, "rotary")),
        stateless(lambda raw: coefficients_by_means(raw, 8, "rotary")),
        x,
    )


@pytest.mark.parametrize("turned", [False, True])
def test_boxes_of_dilated_attention(turned: bool) -> None:
    patterns = ((8, 1), (32, 4), (40, 12))
    segments, dilations = zip(*patterns, strict=True)
    rates = {"frequencies": torch.rand(3), "growth": torch.rand(3) * 1e-2} if turned else {}
    settings = DilatedSettings(patterns, scale=6**-0.5, **rates)
    agree(
        stateless(lambda q, k, v: boxes.dilated_attention_triton(q, k, v, settings)),
        stateless(
            lambda q, k, v: dilated_attention(
                q, k, v, segment_lengths=segments, dilations=dilations, **rates, backend="reference"
            )
        ),
        {name: torch.randn(1, 40, 12, 6) for name in "qkv"},
    )


def rounded(x: Any, dtype: torch.dtype) -> Any:
    """Numbers that are floats of 32 bits as others, of 16; a copy."""
    if isinstance(x, Tensor):
        return x.to(dtype, copy=True) if x.dtype in (torch.float32, torch.float16) else x.clone()
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(rounded(y, dtype) for y in x))
    return [rounded(y, dtype) for y in x] if isinstance(x, (list, tuple)) else x


class Step(NamedTuple):
    """A decoding step by kernels and by formulas: inputs in float16, what else they read, what they change."""

    kernels: Callable[..., Tensor]
    formulas: Callable[..., Tensor]
    inputs: list[Tensor]
    memory: Any


def softmax_steps() -> Step:
    cos, sin = (x[:, 7:] for x in test_softmax_step.table(8, 8))

    def of(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, memory: call(q, k, v, memory, cos, sin, False, 0.3)

    inputs, memory = test_softmax_step.token(1), test_softmax_step.ring(100, 65)
    return Step(of(softmax_step.softmax_attention_step_triton), of(softmax_attention_step_torch), inputs, memory)


def collinear_steps(groups: int = 2) -> Step:
    held = test_softmax_step.Ring(
        torch.rand(2, 100, groups, 4), torch.randn(2, 100, groups, 6), torch.full((2,), 65, dtype=torch.int32)
    )
    places, theta = torch.full((2, 1), 65), test_collinear_step.frequencies(8)

    def of(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, t, v, memory: call(q, t, v, memory, places, theta, 1.5, "strict", 0.3)

    kernels, formulas = collinear_step.collinear_attention_step_triton, collinear_attention_step_torch
    return Step(of(kernels), of(formulas), list(test_collinear_step.token(1, groups)), held)


def dilated_steps() -> Step:
    settings = DilatedSettings(test_dilated_step.LONGNET, scale=0.3, distance_bias=alibi_bias(4, 20))
    live = live_patterns(settings, 4, 4)

    def of(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, memory: call(q, k, v, live, memory[0], memory[1], settings, None, None)

    memory = [test_dilated_step.empty(live, 4, 20), torch.zeros(2, dtype=torch.int64)]
    inputs = test_dilated_step.texts(1, 4, 4)
    return Step(of(dilated_step.dilated_attention_step_triton), of(dilated_attention_step_torch), inputs, memory)


@pytest.mark.parametrize("make", [softmax_steps, collinear_steps, partial(collinear_steps, 4), dilated_steps])
def test_steps(make: Callable[[], Step]) -> None:
    step = make()
    inputs = [x.half() for x in step.inputs]
    ours, theirs = (rounded(rounded(step.memory, torch.float16), dtype) for dtype in (torch.float16, torch.float32))
    for _ in range(3):
        want = step.formulas(*(x.float() for x in inputs), theirs)
        got = step.kernels(*inputs, ours)
        assert got.dtype == torch.float16
        assert_close(got, want, FLOAT16, largest=torch.ones(()))


def test_steps_of_dynamic_mask() -> None:
    parts = test_dynamic_mask_step.text(12, 1)
    narrow = [x.half() for x in parts[:3]] + parts[3:]
    results = []
    for dtype, backend in ((torch.float32, "torch"), (torch.float16, "triton")):
        live, outs = test_dynamic_mask_step.nothing_yet(5, 1, dtype=dtype), []
        for t in range(12):
            q, k, v, bias, cos, sin = (x[:, t : t + 1] for x in narrow)
            tokens = (x.to(dtype) for x in (q, k, v))
            more = {"keep": 5, "cos": cos, "sin": sin, "norms": None, "backend": backend}
            outs.append(test_dynamic_mask_step.run_kernels(*tokens, bias, bias, live, **more))
        results.append(torch.cat(outs, dim=1))
    assert results[1].dtype == torch.float16
    assert_close(results[1], results[0], FLOAT16)


def test_scores_of_dynamic_mask() -> None:
    x, weight, offset, scale = test_dynamic_mask_scores.inputs(3, 40, 3, torch.float16)
    got = scores_triton.dynamic_mask_scores_triton(x, weight, offset, scale, True)
    test_dynamic_mask_scores.compare(got, dynamic_mask_scores_torch(x, weight, offset, scale, True))
