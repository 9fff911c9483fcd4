"""The decoding steps of softmax, collinear and dilated attention on a GPU, against the formulas in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farspan.ops.collinear.step import collinear_attention_step
from farspan.ops.dilated.live import live_patterns, write_live
from farspan.ops.dilated.patterns import DilatedSettings
from farspan.ops.dilated.step import dilated_attention_step
from farspan.ops.softmax.step import Ring, softmax_attention_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
ROWS = 3


def ring(slots: int, written: int, groups: int, width: int, values: int, masked: bool) -> Ring:
    mask = torch.arange(slots, device="cuda") >= torch.arange(ROWS, device="cuda")[:, None] * 5 if masked else None
    filled = torch.full((ROWS,), written, dtype=torch.int32, device="cuda")
    keys, held = (torch.randn(ROWS, slots, groups, size, device="cuda") for size in (width, values))
    # What was never written must not be read.
    for buffer in (keys, held):
        buffer[:, written + 1 :] = float("nan")
    return Ring(keys, held, filled, mask)


def copied(held: Ring, dtype: torch.dtype) -> Ring:
    keys, values = (x.to(dtype, copy=True) for x in (held.keys, held.values))
    if dtype == torch.float64:
        keys, values = keys.nan_to_num(), values.nan_to_num()
    return Ring(keys, values, held.filled.clone(), None if held.mask is None else held.mask.clone())


def within(got: Tensor, plain: Tensor, want: Tensor) -> None:
    """Twice the error of the PyTorch form of the same dtype."""
    ours, theirs = (float((x.double() - want).abs().max() / want.abs().max()) for x in (got, plain))
    assert ours <= 2 * theirs + 1e-6, (ours, theirs)


def compare(op: Callable[..., Tensor], tensors: list[Tensor], held: Ring, dtype: torch.dtype) -> None:
    """Within twice the error of the PyTorch form of the same dtype; repeated runs agree to the bit."""
    tensors = [x.to(dtype) for x in tensors]
    held = held._replace(keys=held.keys.to(dtype), values=held.values.to(dtype))
    want = op(*(x.double() for x in tensors), copied(held, torch.float64), backend="torch")
    clean = held._replace(keys=held.keys.nan_to_num(), values=held.values.nan_to_num())
    plain = op(*tensors, copied(clean, dtype), backend="torch")
    rings = [copied(held, dtype) for _ in range(3)]
    runs = [op(*tensors, mine, backend="triton") for mine in rings]
    within(runs[0], plain, want)
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    assert rings[0].filled.eq(held.filled + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (8, 2, 128), (3, 1, 40), (40, 2, 64)])
@pytest.mark.parametrize(("slots", "written", "masked"), [(64, 0, False), (5000, 4097, True), (512, 700, False)])
def test_softmax_step(
    slots: int, written: int, masked: bool, heads: int, groups: int, width: int, dtype: torch.dtype
) -> None:
    sizes = ((heads, width), (groups, width), (groups, width))
    tensors = [torch.randn(ROWS, 1, *size, device="cuda") for size in sizes]
    angles = torch.rand(ROWS, 1, width // 4, device="cuda")

    def op(q: Tensor, k: Tensor, v: Tensor, held: Ring, backend: str) -> Tensor:
        return softmax_attention_step(q, k, v, held, cos=angles.cos(), sin=angles.sin(), backend=backend)

    compare(op, tensors, ring(slots, written, groups, width, width, masked), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["slack", "strict"])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "rotary"), [(4, 4, 64, 64), (8, 2, 128, 64), (36, 12, 40, 40), (12, 12, 40, 40)]
)
@pytest.mark.parametrize(("slots", "written", "masked"), [(64, 0, False), (5000, 4097, True), (512, 700, False)])
def test_collinear_step(
    slots: int,
    written: int,
    masked: bool,
    heads: int,
    groups: int,
    width: int,
    rotary: int,
    form: str,
    dtype: torch.dtype,
) -> None:
    tensors = [torch.randn(ROWS, 1, heads, width, device="cuda")]
    tensors += [torch.randn(ROWS, 1, groups, size, device="cuda") for size in (width // 2, width)]
    tensors[1].relu_()
    rates = 10000.0 ** -(torch.arange(0, rotary, 2, device="cuda") / rotary)
    positions = written - 5 * torch.arange(ROWS, device="cuda")[:, None] * masked

    def op(q: Tensor, t: Tensor, v: Tensor, held: Ring, backend: str) -> Tensor:
        # Angles are exact where the rest is.
        theta = rates.to(torch.promote_types(q.dtype, torch.float32))
        return collinear_attention_step(q, t, v, held, positions, theta, rotary_scale=1.1, form=form, backend=backend)

    held = ring(slots, written, groups, width // 2, width, masked)
    compare(op, tensors, held._replace(keys=held.keys.relu()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (8, 2, 128), (3, 1, 40)])
@pytest.mark.parametrize("before", [0, 5003])
def test_dilated_step(before: int, heads: int, groups: int, width: int, biased: bool, dtype: torch.dtype) -> None:
    bias = torch.randn(heads, 2 * before + 3, device="cuda") if biased else None
    patterns = ((256, 1), (1024, 2), (4096, 4), (9000, 7))
    settings = DilatedSettings(patterns, scale=width**-0.5, distance_bias=bias)
    live = live_patterns(settings, heads, groups)
    text = [torch.randn(ROWS, before + 1, groups, width, device="cuda") for _ in "kv"]
    q, angles = torch.randn(ROWS, 1, heads, width, device="cuda"), torch.rand(ROWS, 1, width // 4, device="cuda")
    places = torch.arange(before + 1, device="cuda").expand(ROWS, -1)
    real = places < before - 3 * torch.arange(ROWS, device="cuda")[:, None]

    def step(dtype: torch.dtype, backend: str) -> tuple[Tensor, list[Tensor]]:
        # All of them keep numbers of the tested dtype.
        k, v, query = (x.to(tested).to(dtype) for x in (*text, q))
        buffers = [(k.new_zeros(ROWS, x.rows(before + 1), groups, width),) * 2 for x in live]
        buffers = [(keys, values.clone()) for keys, values in buffers]
        write_live(live, buffers, k, v, places, real)
        state = {"patterns": live, "buffers": buffers, "seen": real.sum(1), "settings": settings}
        turns = angles.cos(), angles.sin()
        out = dilated_attention_step(query, k[:, -1:], v[:, -1:], **state, cos=turns[0], sin=turns[1], backend=backend)
        assert state["seen"].eq(real.sum(1) + 1).all()
        return out, [x[:, :-1] for pair in buffers for x in pair]

    tested = dtype
    (got, held), (plain, _), (want, right) = step(dtype, "triton"), step(dtype, "torch"), step(torch.float64, "torch")
    within(got, plain, want)
    for ours, theirs in zip(held, right, strict=True):
        # What is rotated is a difference: its error is one of the larger numbers.
        torch.testing.assert_close(ours.double(), theirs, atol=4 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)
    assert torch.equal(step(dtype, "triton")[0], got)
