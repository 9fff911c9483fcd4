"""Biases and rankings of keys from a layer's input: the kernel gives the formula's numbers."""

import pytest
import torch

from farspan.errors import ShapeError
from farspan.ops.dynamic_mask.scores import dynamic_mask_scores, dynamic_mask_scores_torch
from tests.ops.conftest import INTERPRETED

Scores = tuple[torch.Tensor, torch.Tensor]


def inputs(rows: int, width: int, heads: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Among the rows are equal ones, and logits from far below 0 to far above."""
    torch.manual_seed(rows)
    x, weight = torch.randn(1, rows, width).to(dtype), torch.randn(heads, width, dtype=torch.float64) * width**-0.5
    x[:, 1::5] *= 60
    x[:, ::7] = x[:, :1].clone()
    return [t.to(device) for t in (x, weight, torch.randn(heads, dtype=torch.float64), torch.randn(heads).to(dtype))]


def compare(got: Scores, want: Scores) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1.2e-7, atol=0.0)
    ranking = got[1]
    assert torch.equal(ranking[:, ::7], ranking[:, :1].expand(-1, len(range(0, ranking.shape[1], 7)), -1))


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs the kernel on a CPU")
@pytest.mark.parametrize(("rows", "width", "heads"), [(3, 40, 3), (20, 24, 5)])
@pytest.mark.parametrize("exponential", [True, False])
def test_kernel_matches_the_formula(
    rows: int, width: int, heads: int, exponential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farspan.ops.dynamic_mask import scores_triton

    monkeypatch.setattr(scores_triton, "CHANNELS", 16)
    monkeypatch.setattr(scores_triton, "MANY", 10)
    x, weight, offset, scale = inputs(rows, width, heads, torch.float32)
    for shift in (offset, None):
        got = scores_triton.dynamic_mask_scores_triton(x, weight, shift, scale, exponential)
        compare(got, dynamic_mask_scores_torch(x, weight, shift, scale, exponential))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
@pytest.mark.parametrize(("rows", "width", "heads"), [(1, 64, 2), (4, 1024, 16), (5000, 1024, 8), (1030, 1000, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_on_a_card_matches_the_formula(rows: int, width: int, heads: int, dtype: torch.dtype) -> None:
    x, weight, offset, scale = inputs(rows, width, heads, dtype, "cuda")
    for shift, exponential in ((offset, True), (None, False)):
        got, want = (
            dynamic_mask_scores(x, weight, shift, scale, exponential=exponential, backend=name)
            for name in ("triton", "torch")
        )
        compare(got, want)


def test_equal_tokens_rank_equal_in_every_call() -> None:
    x, weight, offset, scale = inputs(50, 64, 4, torch.float32)
    whole = dynamic_mask_scores(x, weight, offset, scale)[1]
    steps = torch.cat([dynamic_mask_scores(x[:, t : t + 1], weight, offset, scale)[1] for t in range(50)], dim=1)
    assert torch.equal(whole, steps)


def test_float64_keeps_its_bias() -> None:
    x, weight, offset, scale = inputs(9, 8, 2, torch.float64)
    bias, ranking = dynamic_mask_scores(x, weight, offset, scale, exponential=False)
    assert bias.dtype == torch.float64
    assert torch.equal(bias.float(), ranking)


def test_scores_are_checked() -> None:
    x, weight, offset, scale = inputs(9, 8, 2, torch.float32)
    with pytest.raises(ShapeError, match="weight has shape"):
        dynamic_mask_scores(x[..., :7], weight, offset, scale)
