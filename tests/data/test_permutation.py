"""The O(1) permutation is a permutation, seeded, and well mixed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.permutation import Permutation
from farspan.errors import ConfigError


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_every_entry_appears_once(size: int, seed: int) -> None:
    found = Permutation(size, (seed,))(np.arange(size))
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(size))


@given(st.integers(1, 2**62), st.integers(0, 99))
def test_single_entries_of_huge_permutations_are_in_range(size: int, seed: int) -> None:
    indices = np.array([0, size // 2, size - 1])
    found = Permutation(size, (seed,))(indices)
    assert ((found >= 0) & (found < size)).all()
    assert len(set(found.tolist())) == len(set(indices.tolist()))
    assert Permutation(size, (seed,))(indices[1:2])[0] == found[1]


def test_seeds_give_different_orders_without_visible_structure() -> None:
    size = 10_007
    orders = [Permutation(size, (seed, epoch))(np.arange(size)) for seed in (0, 1) for epoch in (0, 1)]
    for number, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert (order == np.arange(size)).sum() < 10
        for other in orders[:number]:
            assert (order == other).sum() < 10


def test_small_permutations_all_occur() -> None:
    found = {tuple(Permutation(3, (seed,))(np.arange(3)).tolist()) for seed in range(200)}
    assert len(found) == 6


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="not possible"):
        Permutation(size, (0,))
