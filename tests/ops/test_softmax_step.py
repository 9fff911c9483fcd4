"""One decoding step of softmax attention: the ring it writes, and the same numbers from the kernels."""

import pytest
import torch
from torch import Tensor

from farspan.errors import ShapeError
from farspan.ops.rotary import apply_rotary
from farspan.ops.softmax.api import softmax_attention
from farspan.ops.softmax.step import Ring, beyond_steps, softmax_attention_step, softmax_attention_step_torch
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED

ROWS, HEADS, GROUPS, WIDTH, VALUES = 2, 4, 2, 8, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[1]))


def ring(slots: int, held: int, masked: bool = False) -> Ring:
    """A ring into which `held` tokens were written."""
    keys, values = drawn(ROWS, slots, GROUPS, WIDTH), drawn(ROWS, slots, GROUPS, VALUES, seed=1)
    mask = torch.arange(slots).expand(ROWS, -1) >= torch.tensor([[0], [held // 2]]) if masked else None
    return Ring(keys, values, torch.full((ROWS,), held, dtype=torch.int32), mask)


def token(length: int) -> list[Tensor]:
    sizes = ((HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, VALUES))
    return [drawn(ROWS, length, *size, seed=7 + i) for i, size in enumerate(sizes)]


def table(length: int, rotary: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * 10.0 ** -torch.arange(rotary // 2)
    return angles.cos().expand(ROWS, -1, -1), angles.sin().expand(ROWS, -1, -1)


@pytest.mark.parametrize("window", [None, 5])
def test_steps_equal_the_whole(window: int | None) -> None:
    length = 12
    q, k, v = token(length)
    cos, sin = table(length, 6)
    want = softmax_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, window=window)
    held = ring(window or length, 0)
    steps = []
    for i in range(length):
        now = slice(i, i + 1)
        parts = (x[:, now] for x in (q, k, v))
        steps.append(softmax_attention_step(*parts, held, cos=cos[:, now], sin=sin[:, now]))
    assert_close(torch.cat(steps, dim=1), want, tolerances.FLOAT32, "out")
    assert held.filled.tolist() == [length] * ROWS


CASES = {
    "first": (70, 0, False, 0, False),
    "some": (700, 300, False, 8, False),
    "interleaved": (100, 65, False, 4, True),
    "masked": (300, 200, True, 8, False),
    "around": (70, 200, False, 8, False),
    "around, masked": (64, 127, True, 4, False),
}


@pytest.mark.skipif(not INTERPRETED, reason="kernels run here in the interpreter alone")
@pytest.mark.parametrize("case", CASES)
def test_kernels_match_the_formulas(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("farspan.ops.softmax.step_triton")
    monkeypatch.setattr(module, "SIDE_BY_SIDE", 64)  # so that there are several stretches
    slots, written, masked, rotary, interleaved = CASES[case]
    q, k, v = token(1)
    cos, sin = (x[:, 7:] for x in table(8, rotary)) if rotary else (None, None)
    held = ring(slots, written, masked)
    theirs = Ring(*(x if x is None else x.clone() for x in held))
    for _ in range(2):
        want = softmax_attention_step_torch(q, k, v, theirs, cos, sin, interleaved, 0.3)
        got = module.softmax_attention_step_triton(q, k, v, held, cos, sin, interleaved, 0.3)
        assert_close(got, want, tolerances.FLOAT32, "out")
    for name, ours, other in zip(Ring._fields, held, theirs, strict=True):
        if ours is not None:
            assert_close(ours.float(), other.float(), tolerances.FLOAT32, name)


def test_what_is_changed_in_place_is_checked() -> None:
    q, k, v = token(1)
    held = ring(4, 0)
    with pytest.raises(ShapeError, match=r"ring.filled is torch.int64 for S=4 slots; give int32"):
        softmax_attention_step(q, k, v, held._replace(filled=held.filled.long()))
    with pytest.raises(ShapeError, match="have to be contiguous"):
        softmax_attention_step(q, k, v, held._replace(keys=held.keys.mT.contiguous().mT))
    with pytest.raises(ShapeError, match="H=3 query heads cannot share G=2"):
        softmax_attention_step(q[:, :, :3], k, v, held)


def test_more_rows_than_a_grid_has_programs_are_left_to_the_formulas() -> None:
    rows = [torch.zeros(1, 1, 2, 4).expand(rows, -1, -1, -1) for rows in (65536, 65535)]
    assert [beyond_steps(3 * [x]) for x in rows] == ["the kernels take at most 65535 rows", None]
