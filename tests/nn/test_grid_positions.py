"""Positions in the plane against the published construction, and interpolation."""

import numpy as np
import pytest
import torch

from farspan.nn.grid_positions import sincos, sincos_2d, stretch_grid
from tests import tolerances


def published_table(width: int, size: int) -> torch.Tensor:
    """facebookresearch/mae's table as its formula reads: every place of a square grid, row after row."""
    table = np.zeros((size * size, width))
    quarter = width // 4
    for place in range(size * size):
        for half, number in enumerate((place % size, place // size)):
            for j in range(quarter):
                angle = number / 10000 ** (j / quarter)
                table[place, half * 2 * quarter + j] = np.sin(angle)
                table[place, half * 2 * quarter + quarter + j] = np.cos(angle)
    return torch.from_numpy(table).float()


@pytest.mark.parametrize(("width", "size"), [(4, 1), (8, 3), (24, 7)])
def test_sincos_2d_is_the_published_table(width: int, size: int) -> None:
    places = torch.arange(size * size)
    ours = sincos_2d(places // size, places % size, width, size)
    torch.testing.assert_close(ours, published_table(width, size), rtol=0, atol=1e-7)


def test_far_positions_keep_their_precision() -> None:
    exact = np.sin(np.float64(999_999))
    assert sincos(torch.tensor([999_999]), 2)[0, 0].item() == pytest.approx(exact, abs=1e-7)


def test_stretching_to_the_same_grid_is_the_table_itself() -> None:
    table = torch.randn(12, 8)
    assert stretch_grid(table, (3, 4), (3, 4)) is table
    assert not stretch_grid(table, (3, 4), (4, 3)).equal(table)


def test_stretching_keeps_constants_and_the_order_of_rows_and_columns() -> None:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    table = torch.stack((torch.ones(6, 9), rows, columns), dim=-1).flatten(0, 1)
    wide = stretch_grid(table, (6, 9), (12, 18)).unflatten(0, (12, 18))
    torch.testing.assert_close(wide[..., 0], torch.ones(12, 18), rtol=0, atol=tolerances.FLOAT32)
    # Places 2i and 2i + 1 of the finer grid lie on both sides of place i, equally far.
    inside = torch.arange(2.0, 4.0)
    torch.testing.assert_close(wide[4:8, 6, 1].unflatten(0, (2, 2)).mean(1), inside, rtol=0, atol=tolerances.FLOAT32)
    torch.testing.assert_close(wide[6, 4:8, 2].unflatten(0, (2, 2)).mean(1), inside, rtol=0, atol=tolerances.FLOAT32)


def test_the_offset_is_that_of_the_published_code() -> None:
    """LongViT forms its scale from 5.1 rows and 7.1 columns instead of 5 and 7."""
    table = torch.randn(12, 8)
    image = table.reshape(1, 3, 4, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, scale_factor=(5.1 / 3, 7.1 / 4), mode="bicubic")
    ours = stretch_grid(table, (3, 4), (5, 7), 0.1)
    torch.testing.assert_close(ours, expected.permute(0, 2, 3, 1).reshape(35, 8))
    assert stretch_grid(table, (3, 4), (3, 4), 0.1) is table
    for size in range(1, 200):  # the reason for it: no rounding may lose a row
        assert stretch_grid(table[:3, :1], (3, 1), (size, 1), 0.1).shape == (size, 1)


def test_stretching_passes_gradients_and_keeps_the_dtype() -> None:
    table = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    wide = stretch_grid(table, (2, 2), (4, 4))
    assert wide.dtype == torch.bfloat16
    wide.sum().backward()
    assert table.grad is not None and table.grad.float().sum().item() == pytest.approx(48, rel=tolerances.BFLOAT16)
