"""One decoding step of dilated attention is the last row of the whole, and the kernels' numbers are the formulas'."""

import pytest
import torch
from torch import Tensor

from farspan.errors import BackendUnavailable, ShapeError
from farspan.nn.positions import alibi_bias
from farspan.ops import dilated_attention
from farspan.ops.dilated.live import LivePattern, live_patterns, write_live
from farspan.ops.dilated.patterns import DilatedSettings
from farspan.ops.dilated.step import dilated_attention_step, dilated_attention_step_torch
from farspan.ops.rotary import apply_rotary
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED

ROWS, WIDTH, VALUES = 2, 8, 6
LONGNET = ((8, 1), (16, 2), (32, 4), (48, 6), (96, 12))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[1]))


def texts(length: int, heads: int, groups: int) -> list[Tensor]:
    sizes = ((heads, WIDTH), (groups, WIDTH), (groups, VALUES))
    return [drawn(ROWS, length, *size, seed=i) for i, size in enumerate(sizes)]


def empty(patterns: list[LivePattern], groups: int, room: int) -> list[tuple[Tensor, Tensor]]:
    rows = [pattern.rows(room) for pattern in patterns]
    return [(torch.zeros(ROWS, n, groups, WIDTH), torch.zeros(ROWS, n, groups, VALUES)) for n in rows]


def table(length: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * 10.0 ** -torch.arange(WIDTH // 2)
    return angles.cos().expand(ROWS, -1, -1), angles.sin().expand(ROWS, -1, -1)


@pytest.mark.parametrize(("heads", "groups", "rule"), [(4, 4, "mod"), (6, 2, "block"), (3, 1, "none")])
@pytest.mark.parametrize("patterns", [LONGNET[:3], ((5, 3), (9, 7))], ids=str)
def test_steps_equal_the_whole(patterns: tuple[tuple[int, int], ...], heads: int, groups: int, rule: str) -> None:
    length = 23
    q, k, v = texts(length, heads, groups)
    cos, sin = table(length)
    segments, dilations = zip(*patterns, strict=True)
    turned = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    want = dilated_attention(*turned, v, segment_lengths=segments, dilations=dilations, head_offset=rule)
    settings = DilatedSettings(patterns, rule, scale=WIDTH**-0.5)
    live = live_patterns(settings, heads, groups)
    buffers, seen = empty(live, groups, length), torch.zeros(ROWS, dtype=torch.int64)
    steps = []
    for i in range(length):
        now, state = slice(i, i + 1), {"patterns": live, "buffers": buffers, "seen": seen}
        parts = (x[:, now] for x in (q, k, v))
        steps.append(dilated_attention_step(*parts, **state, settings=settings, cos=cos[:, now], sin=sin[:, now]))
    assert_close(torch.cat(steps, dim=1), want, tolerances.FLOAT32)
    assert seen.tolist() == [length] * ROWS


@pytest.mark.skipif(not INTERPRETED, reason="kernels run here in the interpreter alone")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("heads", "groups", "rule"), [(4, 4, "mod"), (6, 2, "mod"), (6, 2, "block"), (3, 1, "none")])
@pytest.mark.parametrize(("patterns", "before"), [(LONGNET, 0), (LONGNET, 93), (((400, 1), (9, 7)), 301)], ids=str)
def test_kernels_match_the_formulas(
    patterns: tuple[tuple[int, int], ...], before: int, heads: int, groups: int, rule: str, biased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    softmax = pytest.importorskip("farspan.ops.softmax.step_triton")
    module = pytest.importorskip("farspan.ops.dilated.step_triton")
    monkeypatch.setattr(softmax, "SIDE_BY_SIDE", 32)  # so that there are several stretches
    steps = 4
    bias = alibi_bias(heads, before + steps) if biased else None
    settings = DilatedSettings(patterns, rule, scale=0.3, distance_bias=bias)
    live = live_patterns(settings, heads, groups)
    buffers = empty(live, groups, before + steps)
    _, k, v = texts(before + 1, heads, groups)
    past = torch.arange(before + 1).expand(ROWS, -1)
    # One row begins later than the other.
    real = torch.stack((past[0] < before, past[0] < before // 2))
    write_live(live, buffers, k, v, past, real)
    theirs, seen = [tuple(x.clone() for x in pair) for pair in buffers], real.sum(1)
    counted, (cos, sin) = seen.clone(), table(steps)
    for i in range(steps):
        q, k, v = (x[:, i : i + 1] for x in texts(steps, heads, groups))
        turns = None if biased else cos[:, i : i + 1], None if biased else sin[:, i : i + 1]
        want = dilated_attention_step_torch(q, k, v, live, theirs, counted, settings, *turns)
        got = module.dilated_attention_step_triton(q, k, v, live, buffers, seen, settings, *turns)
        assert_close(got, want, tolerances.FLOAT32, "out", largest=torch.ones(()))
    assert torch.equal(seen, counted)
    for ours, other in zip(buffers, theirs, strict=True):
        for kind, a, b in zip(("keys", "values"), ours, other, strict=True):
            # The spare row takes what no head keeps, in the form that has one.
            assert_close(a[:, :-1], b[:, :-1], tolerances.FLOAT32, kind, largest=torch.ones(()))


def test_what_cannot_be_a_step_is_refused() -> None:
    settings = DilatedSettings(((4, 1),))
    live = live_patterns(settings, 2, 2)
    state = {"patterns": live, "seen": torch.zeros(ROWS, dtype=torch.int64), "settings": settings}
    buffers = empty(live, 2, 4)
    with pytest.raises(ShapeError, match=r"T=1 \(from a step\)"):
        dilated_attention_step(*texts(2, 2, 2), buffers=buffers, **state)
    with pytest.raises(ShapeError, match="have to be contiguous"):
        dilated_attention_step(*texts(1, 2, 2), buffers=[(buffers[0][0].mT.contiguous().mT, buffers[0][1])], **state)
    with pytest.raises(ShapeError, match=r"the values of buffers\[0\] has shape .* expected \[B, rows0, G, V\]"):
        dilated_attention_step(*texts(1, 2, 2), buffers=[(buffers[0][0], buffers[0][0])], **state)
    with pytest.raises(ShapeError, match=r"seen is torch\.int32, H=2, G=2; expected int64"):
        dilated_attention_step(*texts(1, 2, 2), buffers=buffers, **state | {"seen": state["seen"].int()})
    with pytest.raises(BackendUnavailable, match="backend='triton' cannot serve here"):
        dilated_attention_step(*texts(1, 2, 2), buffers=buffers, **state, backend="triton")
