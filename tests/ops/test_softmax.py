"""The fused form equals the formula, forward and gradient, for every kind of visibility."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farspan.errors import ConfigError, ShapeError
from farspan.ops.softmax.api import softmax_attention


def _tensors(batch: int, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = ((batch, queries, 4, 6), (batch, keys, 2, 6), (batch, keys, 2, 5))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _agree(tensors: list[torch.Tensor], **options: object) -> None:
    outs = [softmax_attention(*tensors, backend=backend, **options) for backend in ("reference", "torch")]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-10, rtol=1e-8)
    cotangent = torch.randn_like(outs[0])
    grads = [torch.autograd.grad((out * cotangent).sum(), tensors) for out in outs]
    for fused, plain in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-10, rtol=1e-8)


@given(
    queries=st.integers(1, 9),
    past=st.integers(0, 5),
    window=st.one_of(st.none(), st.integers(1, 12)),
    causal=st.booleans(),
    masked=st.booleans(),
)
def test_fused_equals_formula(queries: int, past: int, window: int | None, causal: bool, masked: bool) -> None:
    mask = torch.rand(2, queries + past) > 0.3 if masked else None
    _agree(_tensors(2, queries, queries + past), causal=causal, window=window, key_mask=mask)


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    window=st.one_of(st.none(), st.integers(1, 4)),
    causal=st.booleans(),
)
def test_packed_documents_do_not_see_each_other(lengths: list[int], window: int | None, causal: bool) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    _agree(_tensors(1, sum(lengths), sum(lengths)), causal=causal, window=window, cu_seqlens=bounds)


def test_long_window_uses_blocks() -> None:
    _agree(_tensors(2, 37, 37), window=8)
    _agree(_tensors(1, 64, 64), window=16)


@pytest.mark.parametrize("most", [1, 200, 700])
def test_what_fused_kernels_cannot_address_goes_in_pieces(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.ops.softmax.torch._MOST_NUMBERS", most)
    _agree(_tensors(5, 9, 9))
    _agree(_tensors(5, 7, 9), key_mask=torch.rand(5, 9) > 0.3)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "options", [{"causal": False}, {}, {"window": 4}, {"cu_seqlens": torch.tensor([0, 12, 20], dtype=torch.int32)}]
)
def test_dropout_leaves_out_weights_and_keeps_their_mean(backend: str, options: dict) -> None:
    q, k, v = (torch.randn(1, 20, 200, 4) for _ in range(3))
    ones = torch.ones(1, 20, 200, 1)
    kept = softmax_attention(q, k, ones, backend=backend, dropout=0.25, **options)
    assert kept.mean().item() == pytest.approx(1, abs=0.05) and kept.std() > 0.1
    first = softmax_attention(q, k, v, backend=backend, dropout=0.25, **options)[:, 0]
    if options.get("causal", True):  # the first query has one key, of weight 1: all or nothing
        assert (torch.isclose(first, v[:, 0] / 0.75, atol=1e-6).all(-1) | (first == 0).all(-1)).all()
        assert (first == 0).all(-1).float().mean().item() == pytest.approx(0.25, abs=0.1)


def test_a_query_without_keys_gives_zero() -> None:
    q, k, v = _tensors(1, 2, 2)
    out = softmax_attention(q, k, v, key_mask=torch.tensor([[False, True]]))
    assert (out[0, 0] == 0).all() and (out[0, 1] != 0).any()


def test_gradcheck_of_the_reference() -> None:
    tensors = [torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: softmax_attention(q, k, v, backend="reference"), tensors)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "words"),
    [
        (((1, 3, 4, 6), (1, 2, 2, 6), (1, 2, 2, 5)), {}, ShapeError, "S=2 keys are too few"),
        (((1, 3, 4, 6), (1, 3, 3, 6), (1, 3, 3, 5)), {}, ShapeError, "cannot share G=3"),
        (((1, 3, 4, 6), (1, 3, 2, 5), (1, 3, 2, 5)), {}, ShapeError, "k has shape"),
        (((1, 3, 4, 6), (1, 3, 2, 6), (1, 3, 2, 5)), {"window": 0}, ConfigError, "window=0"),
        (((1, 3, 4, 6), (1, 3, 2, 6), (1, 3, 2, 5)), {"dropout": 1.0}, ConfigError, "dropout=1.0 must lie in"),
    ],
)
def test_bad_calls(shapes: tuple, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        softmax_attention(*(torch.zeros(shape) for shape in shapes), **options)
