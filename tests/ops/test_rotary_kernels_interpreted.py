"""The kernel that rotates queries and keys together, in Triton's interpreter against the formula, with gradients."""

import pytest
import torch
from torch import Tensor

from farspan.ops import rotary_norm_triton, rotary_triton
from farspan.ops.rotary import normed_rotary_pair_torch, rotary_pair_torch
from farspan.ops.rotary_norm_triton import normed_rotary_pair_triton
from farspan.ops.rotary_triton import rotary_pair_triton
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.recording import rehearsed_and_launched


def results(call: object, q: Tensor, k: Tensor, *rest: object, every: bool = False) -> list[Tensor]:
    """Both outputs and the gradients of q and k; of `every` argument if wanted."""
    leaves = [x.detach().clone().requires_grad_() for x in ((q, k, *rest) if every else (q, k))]
    turned = call(*leaves) if every else call(*leaves, *rest)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype) for x in turned]
    gradients = torch.autograd.grad(sum((x * w).sum() for x, w in zip(turned, weights, strict=True)), leaves)
    return [*(x.detach() for x in turned), *gradients]


@pytest.mark.parametrize(("width", "rotary"), [(8, 8), (6, 6), (10, 4), (8, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_both_match_the_formula(width: int, rotary: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 19, 5, width).to(dtype), torch.randn(2, 19, 2, width).to(dtype)
    angles = torch.rand(2, 19, rotary // 2) * 6
    table = 1.3 * angles.cos(), 1.3 * angles.sin()
    want = results(rotary_pair_torch, q.double(), k.double(), *table, interleaved)
    got = results(rotary_pair_triton, q, k, *table, interleaved)
    for name, a, b in zip(("q", "k", "dq", "dk"), got, want, strict=True):
        assert_close(a, b, tolerances.FLOAT32 if dtype == torch.float32 else 1e-3, name)


@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms_match_the_formula(width: int, interleaved: bool, dtype: torch.dtype) -> None:
    """Weights of another dtype than the vectors, and a number of rows that no block divides."""
    q, k = 3 * torch.randn(2, 19, 5, width).to(dtype), torch.randn(2, 19, 2, width).to(dtype)
    norms = torch.rand(width) + 0.5, torch.randn(width)
    angles = torch.rand(2, 19, width // 2) * 6
    table = angles.cos(), angles.sin()

    def run(call: object, *tensors: Tensor) -> list[Tensor]:
        return results(lambda q, k, a, b: call(q, k, *table, (a, b), 0.1, interleaved), *tensors, every=True)

    want = run(normed_rotary_pair_torch, *(x.double() for x in (q, k, *norms)))
    got = run(normed_rotary_pair_triton, q, k, *norms)
    for name, a, b in zip(("q", "k", "dq", "dk", "dq_norm", "dk_norm"), got, want, strict=True):
        assert_close(a, b, tolerances.FLOAT32 if dtype == torch.float32 else 1e-3, name)


@pytest.mark.parametrize("normed", [False, True])
def test_what_is_launched_has_been_compiled_ahead(normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed, launched = rehearsed_and_launched(rotary_norm_triton if normed else rotary_triton, monkeypatch)
    q, k, cos, norm = (torch.ones(shape) for shape in ((1, 3, 2, 8), (1, 3, 1, 8), (1, 3, 4), (8,)))
    if normed:
        results(normed_rotary_pair_triton, q, k.half(), cos, cos, (norm, norm.half()), 0.1, False)
    else:
        results(rotary_pair_triton, q, k.half(), cos, cos, False)
    assert len(launched) == 2, "forward and gradient"
    assert rehearsed == launched


def test_no_tokens() -> None:
    q = torch.zeros(1, 0, 2, 8)
    assert rotary_pair_triton(q, q, torch.zeros(1, 0, 4), torch.zeros(1, 0, 4), False)[0].shape == q.shape
