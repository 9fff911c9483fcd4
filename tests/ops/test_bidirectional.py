"""Both directions of a causal operator: symmetric under reversal, per document, and nothing but the sum."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farspan.ops import gated_linear_attention, varlen
from farspan.ops.bidirectional import both_ways
from tests import tolerances
from tests.ops.checks import assert_close, boundaries

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def decayed(length: int, cu_seqlens: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Tensors of a recurrence with a decay per head, and its bidirectional output."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 1, length, 2, 4, generator=generator, dtype=torch.float64).unbind(0)
    log_decay = -torch.rand(1, length, 2, generator=generator, dtype=torch.float64)
    tensors = [q, k, v, log_decay]
    return tensors, attend(tensors, cu_seqlens)


def attend(tensors: list[Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
    return both_ways(lambda *x: gated_linear_attention(*x, cu_seqlens=cu_seqlens)[0], *tensors, cu_seqlens=cu_seqlens)


def test_both_ways_equals_the_sum_over_all_tokens() -> None:
    (q, k, v, log_decay), out = decayed(7)
    total = log_decay.cumsum(1)
    for t in range(7):
        want = torch.zeros(2, 4, dtype=torch.float64)
        for s in range(7):
            weight = 2 * torch.ones(2, dtype=torch.float64)  # the token itself counts twice
            if s < t:
                weight = (total[0, t] - total[0, s]).exp()
            elif s > t:
                weight = log_decay[0, t:s].sum(0).exp()
            score = (q[0, t] * k[0, s]).sum(-1) * 4**-0.5
            want = want + (weight * score).unsqueeze(-1) * v[0, s]
        assert_close(out[0, t], want, tolerances.FLOAT64)


@given(lengths=LENGTHS)
def test_reversal_of_the_input_reverses_the_output(lengths: list[int]) -> None:
    bounds = boundaries(lengths)
    tensors, out = decayed(sum(lengths), bounds)
    turned = attend([varlen.reverse(x, bounds) for x in tensors], bounds)
    assert_close(varlen.reverse(turned, bounds), out, tolerances.FLOAT64)


@given(lengths=LENGTHS)
def test_packed_documents_are_turned_one_by_one(lengths: list[int]) -> None:
    bounds = boundaries(lengths)
    tensors, out = decayed(sum(lengths), bounds)
    for start, end in varlen.spans(bounds):
        assert_close(out[:, start:end], attend([x[:, start:end] for x in tensors]), tolerances.FLOAT64)


@given(lengths=LENGTHS)
def test_reversing_twice_is_the_identity(lengths: list[int]) -> None:
    bounds, x = boundaries(lengths), torch.arange(2 * sum(lengths)).reshape(1, -1, 2)
    assert torch.equal(varlen.reverse(varlen.reverse(x, bounds), bounds), x)
    assert torch.equal(varlen.reverse(varlen.reverse(x)), x)


def test_absent_tensors_are_handed_on() -> None:
    x = torch.randn(1, 5, 2, 3)
    out = both_ways(lambda q, k, v, decay: gated_linear_attention(q, k, v, decay, scale=1.0)[0], x, x, x, None)
    scores = torch.einsum("bthk,bshk->bhts", x, x) * (1 + torch.eye(5))
    assert_close(out, torch.einsum("bhts,bshv->bthv", scores, x), tolerances.FLOAT32)
