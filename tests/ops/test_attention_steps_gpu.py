"""The decoding steps of softmax and collinear attention on a GPU, against the formulas in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farspan.ops.collinear.step import collinear_attention_step
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


def compare(op: Callable[..., Tensor], tensors: list[Tensor], held: Ring, dtype: torch.dtype) -> None:
    """Within twice the error of the PyTorch form of the same dtype; repeated runs agree to the bit."""
    tensors = [x.to(dtype) for x in tensors]
    held = held._replace(keys=held.keys.to(dtype), values=held.values.to(dtype))
    want = op(*(x.double() for x in tensors), copied(held, torch.float64), backend="torch")
    clean = held._replace(keys=held.keys.nan_to_num(), values=held.values.nan_to_num())
    plain = op(*tensors, copied(clean, dtype), backend="torch")
    rings = [copied(held, dtype) for _ in range(3)]
    runs = [op(*tensors, mine, backend="triton") for mine in rings]
    largest = want.abs().max()
    ours, theirs = (float((x.double() - want).abs().max() / largest) for x in (runs[0], plain))
    assert ours <= 2 * theirs + 1e-6, (ours, theirs)
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
@pytest.mark.parametrize(("heads", "groups", "width", "rotary"), [(4, 4, 64, 64), (8, 2, 128, 64), (3, 1, 40, 40)])
@pytest.mark.parametrize(("slots", "written", "masked"), [(64, 0, False), (5000, 4097, True)])
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
