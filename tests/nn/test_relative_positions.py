"""xPos, ALiBi and the relative bias."""

import pytest
import torch

from farspan.errors import ConfigError
from farspan.nn.positions import (
    alibi_bias,
    alibi_slopes,
    apply_xpos,
    relative_position_bias,
    relative_position_bucket,
    xpos_rates,
    xpos_scales,
)


def _score(query: int, key: int, centre: float) -> torch.Tensor:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned_q = apply_xpos(q, torch.tensor([[query]]), 32.0, centre=centre)
    return (turned_q * apply_xpos(k, torch.tensor([[key]]), 32.0, key=True, centre=centre)).sum()


def test_xpos_scores_depend_on_distance_alone() -> None:
    torch.testing.assert_close(_score(9, 4, 0), _score(9, 4, 5))
    torch.testing.assert_close(_score(9, 4, 0), _score(1_000_009, 1_000_004, 1_000_000), atol=1e-8, rtol=1e-8)


def test_xpos_decays_with_distance() -> None:
    x = torch.ones(1, 1, 1, 16, dtype=torch.float64)
    sizes = [apply_xpos(x, torch.tensor([[distance]]), 32.0).norm().item() for distance in (0, 10, 100, 1000)]
    assert sizes == sorted(sizes, reverse=True)
    assert xpos_scales(16)[0].item() == pytest.approx(2 / 7)


def test_xpos_range() -> None:
    frequencies, growth = xpos_rates(16, 512.0, reach=32768)
    assert growth.abs().max() * 32768 < 85 and frequencies[0] == 1
    with pytest.raises(ConfigError, match="use at least 15455"):
        xpos_rates(16, 512.0, reach=2**20)


def test_alibi_slopes_are_geometric() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    bias = alibi_bias(2, 3)
    assert bias[1].tolist() == [-2 / 256, -1 / 256, 0, -1 / 256, -2 / 256]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_hold_near_distances_alone_and_far_ones_together(bidirectional: bool) -> None:
    bucket = relative_position_bucket(-torch.arange(300), 32, 128, bidirectional)
    exact = 8 if bidirectional else 16
    assert bucket[:exact].tolist() == list(range(exact))
    assert (bucket.diff() >= 0).all() and (bucket[128:] == 2 * exact - 1).all()
    ahead = relative_position_bucket(torch.arange(1, 300), 32, 128, bidirectional)
    assert (ahead == (bucket[1:] + 16 if bidirectional else 0)).all()


def test_relative_bias_is_looked_up_by_distance() -> None:
    weight = torch.randn(32, 3, requires_grad=True)
    bias = relative_position_bias(weight, 6, bidirectional=False)
    assert bias.shape == (3, 11)
    torch.testing.assert_close(bias[:, 5 - 4], weight[4])
    torch.testing.assert_close(bias[:, 5 + 4], weight[0])
    bias.sum().backward()
    assert weight.grad is not None and weight.grad[0].tolist() == [6.0] * 3
