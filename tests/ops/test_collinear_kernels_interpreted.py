"""The kernels around collinear attention in Triton's interpreter, against their formulas, forward and gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farspan.ops import collinear_attention
from farspan.ops.collinear import triton as kernels
from farspan.ops.collinear.api import coefficients_by_means
from farspan.ops.collinear.triton import collinear_attention_triton, collinear_coefficients_triton
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.recording import rehearsed_and_launched
from tests.ops.test_collinear import table

PARTS = [
    ("slack", "rotary", 6),
    ("slack", "rotary", 2),
    ("slack", "head", 4),
    ("strict", "rotary", 4),
    ("strict", "head", 6),
]


def results(call: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = call(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (3, 40)])
@pytest.mark.parametrize(("form", "tie", "rotary_dim"), PARTS)
def test_attention_matches_reference(form: str, tie: str, rotary_dim: int, queries: int, keys: int) -> None:
    shapes = [(2, queries, 4, 6), (2, keys, 2, 3), (2, keys, 2, 5)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    cos, sin = table(torch.arange(keys) + torch.tensor([[0], [7]]), rotary_dim)
    cos, sin = cos.float(), sin.float()
    want = results(
        lambda q, t, v: collinear_attention(q, t, v, cos, sin, form=form, tie=tie, backend="reference"), tensors
    )
    options = {"causal": True, "window": None, "key_mask": None, "cu_seqlens": None}
    got = results(
        lambda q, t, v: collinear_attention_triton(q, t, v, cos, sin, form=form, tie=tie, scale=6**-0.5, **options),
        [x.float() for x in tensors],
    )
    for name, a, b in zip(("out", "dq", "dt", "dv"), got, want, strict=True):
        assert_close(a, b, tolerances.FLOAT32, name)


@pytest.mark.parametrize(("rotary_dim", "tie"), [(8, "rotary"), (2, "rotary"), (0, "rotary"), (4, "head")])
def test_coefficients_match_their_formula(rotary_dim: int, tie: str) -> None:
    raw = torch.randn(2, 21, 3, 8)
    raw[0, 0] = 0
    want = results(lambda x: coefficients_by_means(x, rotary_dim, tie), [raw])
    got = results(lambda x: collinear_coefficients_triton(x, rotary_dim, tie), [raw])
    for name, a, b in zip(("t", "d_raw"), got, want, strict=True):
        assert_close(a, b, tolerances.FLOAT32, name)


def test_what_is_launched_has_been_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed, launched = rehearsed_and_launched(kernels, monkeypatch)
    raw, q, v = torch.randn(1, 5, 2, 6), torch.randn(1, 5, 4, 6), torch.randn(1, 5, 2, 3)
    cos, sin = table(torch.arange(5)[None], 4)

    def attend(raw: Tensor, q: Tensor) -> Tensor:
        options = {"causal": True, "window": None, "key_mask": None, "cu_seqlens": None, "scale": 1.0}
        t = collinear_coefficients_triton(raw, 4, "rotary")
        return collinear_attention_triton(q, t, v, cos, sin, form="slack", tie="rotary", **options)

    results(attend, [raw, q])
    assert len(launched) == 4, "forward and gradient of both"
    assert rehearsed == launched


def test_nothing_in_nothing_out() -> None:
    assert collinear_coefficients_triton(torch.zeros(1, 0, 2, 8), 8, "rotary").shape == (1, 0, 2, 4)
