"""One decoding step of collinear attention is the last row of the whole, and the kernels' numbers are the formulas'."""

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.ops.collinear.api import collinear_attention
from farspan.ops.collinear.step import collinear_attention_step, collinear_attention_step_torch
from farspan.ops.softmax.step import Ring
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED

ROWS, HEADS, GROUPS, WIDTH = 2, 4, 2, 8


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))


def token(length: int, groups: int = GROUPS) -> tuple[Tensor, Tensor, Tensor]:
    half = WIDTH // 2
    t, v = drawn(ROWS, length, groups, half).relu(), drawn(ROWS, length, groups, 6)
    return drawn(ROWS, length, HEADS, WIDTH), t, v


def frequencies(rotary: int) -> Tensor:
    return 3.0 ** -torch.arange(rotary // 2)


@pytest.mark.parametrize(("form", "rotary"), [("slack", 8), ("slack", 4), ("strict", 8), ("strict", 2)])
@pytest.mark.parametrize("window", [None, 4])
def test_steps_equal_the_whole(form: str, rotary: int, window: int | None) -> None:
    length, theta = 7, frequencies(rotary)
    q, t, v = token(length)
    positions = torch.arange(length).expand(ROWS, -1) + torch.tensor([[0], [5]])
    angles = positions.unsqueeze(-1) * theta
    want = collinear_attention(q, t, v, 1.5 * angles.cos(), 1.5 * angles.sin(), form=form, window=window)
    room = slice(window or length)
    held = Ring(torch.zeros_like(t[:, room]), torch.zeros_like(v[:, room]), torch.zeros(ROWS, dtype=torch.int32))
    steps = []
    for i in range(length):
        now = slice(i, i + 1)
        parts = (x[:, now] for x in (q, t, v))
        steps.append(collinear_attention_step(*parts, held, positions[:, now], theta, rotary_scale=1.5, form=form))
    assert_close(torch.cat(steps, dim=1), want, tolerances.FLOAT32, "out")


@pytest.mark.skipif(not INTERPRETED, reason="kernels run here in the interpreter alone")
@pytest.mark.parametrize(("form", "rotary"), [("slack", 8), ("slack", 4), ("strict", 8), ("strict", 2)])
@pytest.mark.parametrize("groups", [GROUPS, HEADS])
@pytest.mark.parametrize("written", [0, 150, 299, 1070])
def test_kernels_match_the_formulas(
    form: str, rotary: int, written: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    softmax = pytest.importorskip("farspan.ops.softmax.step_triton")
    module = pytest.importorskip("farspan.ops.collinear.step_triton")
    monkeypatch.setattr(softmax, "SIDE_BY_SIDE", 64)  # so that there are several stretches
    q, t, v = token(1, groups)
    slots, theta = 300, frequencies(rotary)
    padding = 0 if written > slots else written // 2
    mask = torch.arange(slots).expand(ROWS, -1) >= torch.tensor([[0], [padding]])
    filled = torch.full((ROWS,), written, dtype=torch.int32)
    held = Ring(drawn(ROWS, slots, groups, WIDTH // 2).relu(), drawn(ROWS, slots, groups, 6), filled, mask.clone())
    theirs = Ring(*(x.clone() for x in held))
    for i in range(2):
        positions = torch.tensor([[written + i], [written - padding + i]])
        want = collinear_attention_step_torch(q, t, v, theirs, positions, theta, 1.5, form, 0.3)
        got = module.collinear_attention_step_triton(q, t, v, held, positions, theta, 1.5, form, 0.3)
        assert_close(got, want, tolerances.FLOAT32, "out")
    for name, ours, other in zip(Ring._fields, held, theirs, strict=True):
        assert_close(ours.float(), other.float(), tolerances.FLOAT32, name)


def test_pairs_that_are_not_tied_are_refused() -> None:
    q, t, v = token(1)
    held = Ring(torch.zeros_like(t), torch.zeros_like(v), torch.zeros(ROWS, dtype=torch.int32))
    with pytest.raises(ConfigError, match="ties no rotary pairs here"):
        collinear_attention_step(q, t, v, held, torch.zeros(ROWS, 1, dtype=torch.long), frequencies(4), tie="head")
