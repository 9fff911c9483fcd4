"""Decoding steps of cosine attention and of state space duality are one token of the whole, changed in place."""

import pytest
import torch
from torch import Tensor

from farspan.errors import ShapeError
from farspan.nn.positions import rope_frequencies, rotary_table
from farspan.ops import _backend
from farspan.ops.cosine.api import cosine_attention
from farspan.ops.cosine.step import cosine_step
from farspan.ops.rotary import apply_rotary
from farspan.ops.ssd.api import state_space_duality
from farspan.ops.ssd.step import state_space_step
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED

BACKEND = "triton" if INTERPRETED else "torch"
# Rotations are formed in float32 wherever they stand.
DTYPES = {torch.float32: tolerances.FLOAT32, torch.float16: 4e-3} if INTERPRETED else {torch.float64: 1e-6}
LENGTH = 6


@pytest.fixture(autouse=True)
def _kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(rotary_dim: int) -> tuple[Tensor, Tensor]:
    positions = torch.tensor([[3], [7]]) + torch.arange(LENGTH)
    return rotary_table(positions, rope_frequencies(rotary_dim, {}, 16, 16)[0])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("norm_position", ["value", "query"])
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(0, False), (6, False), (4, True)])
def test_cosine(rotary_dim: int, interleaved: bool, norm_position: str, counted: bool, dtype: torch.dtype) -> None:
    q, k, v = (draw(i, 2, LENGTH, 3, width).to(dtype) for i, width in ((0, 6), (1, 6), (2, 5)))
    exponent = draw(3, 3, 2).to(wide(dtype))[:, 0] if counted else None
    start, before = draw(4, 2, 3, 6, 5), torch.tensor([2, 0])
    cos, sin = table(rotary_dim) if rotary_dim else (None, None)
    turned = (q, k) if cos is None else (apply_rotary(x.double(), cos, sin, interleaved) for x in (q, k))
    want, final = cosine_attention(
        *(x.double() for x in turned),
        v.double(),
        None if exponent is None else exponent.double(),
        norm_position=norm_position,
        initial_state=start,
        initial_count=before,
        output_final_state=True,
        backend="reference",
    )
    state, count = start.to(wide(dtype), copy=True), before.clone()
    outs = []
    for t in range(LENGTH):
        at = slice(t, t + 1)
        turn = {} if cos is None else {"cos": cos[:, at], "sin": sin[:, at], "rope_interleaved": interleaved}
        row = cosine_step(
            q[:, at], k[:, at], v[:, at], exponent, state, count, norm_position=norm_position, backend=BACKEND, **turn
        )
        outs.append(row)
    assert_close(torch.cat(outs, dim=1), want, DTYPES[dtype])
    assert_close(state, final, max(DTYPES[dtype], 1e-6), "state")
    assert count.tolist() == [8, 6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"skip": True, "bias": True, "rotary_dim": 6}, {"dt_softplus": False, "dt_limit": (0.01, 0.3)}]
)
def test_state_space(options: dict, groups: int, dtype: torch.dtype) -> None:
    options = dict(options)
    x, dt = draw(0, 2, LENGTH, 4, 5).to(dtype), draw(1, 2, LENGTH, 4).to(dtype)
    b, c = (draw(i, 2, LENGTH, groups, 6).to(dtype) for i in (2, 3))
    a, start = -draw(4, 4).abs().to(wide(dtype)), draw(5, 2, 4, 6, 5)
    d = draw(6, 4, 2).to(wide(dtype))[:, 0] if options.pop("skip", False) else None
    dt_bias = draw(7, 4, 2).to(wide(dtype))[:, 0] if options.pop("bias", False) else None
    rotary_dim = options.pop("rotary_dim", 0)
    cos, sin = table(rotary_dim) if rotary_dim else (None, None)
    turned = [z.double() if cos is None else apply_rotary(z.double(), cos, sin) for z in (b, c)]
    none_or_wide = [None if z is None else z.double() for z in (d, dt_bias)]
    want, final = state_space_duality(
        x.double(), dt.double(), a.double(), *turned, none_or_wide[0],
        dt_bias=none_or_wide[1], initial_state=start, output_final_state=True, backend="reference", **options,
    )  # fmt: skip
    state = start.to(wide(dtype), copy=True)
    outs = []
    for t in range(LENGTH):
        at = slice(t, t + 1)
        turn = {} if cos is None else {"cos": cos[:, at], "sin": sin[:, at]}
        row = state_space_step(
            x[:, at], dt[:, at], a, b[:, at], c[:, at], d, state, dt_bias=dt_bias, backend=BACKEND, **options, **turn
        )
        outs.append(row)
    assert_close(torch.cat(outs, dim=1), want, DTYPES[dtype])
    assert_close(state, final, max(DTYPES[dtype], 1e-6), "state")


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel")
def test_what_cannot_be_a_step_is_refused() -> None:
    one = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ShapeError, match=r"T=1 \(from a step\)"):
        cosine_step(*3 * [torch.zeros(1, 2, 2, 3)], None, torch.zeros(1, 2, 3, 3), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"contiguous tensor of torch\.float32"):
        cosine_step(one, one, one, None, torch.zeros(1, 2, 3, 3).double(), torch.zeros(1, dtype=torch.long))
    step = torch.zeros(1, 1, 2)
    with pytest.raises(ShapeError, match="groups of b and c do not divide"):
        keys = torch.zeros(1, 1, 3, 4)
        state_space_step(one, step, torch.zeros(2), keys, keys, None, torch.zeros(1, 2, 4, 3))
