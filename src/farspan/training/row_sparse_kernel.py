"""The Triton kernel of row-sparse AdamW: a program reads a row's gradient, and goes on if there is one."""

# mypy: ignore-errors
import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_adamw_kernel(
    table, gradient, exp_avg, exp_avg_sq, step, rate, shrink,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, EPSILON: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One row: the formulas of `RowSparseAdamW`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BD)
    at, inside = row * D + c, c < D
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if tl.sum((g != 0).to(tl.int32), 0) > 0:
        # Added by one thread and told to all of them: a load of its own could follow the store of another warp.
        n = (tl.atomic_add(step + row, 1.0, sem="relaxed") + 1).to(tl.float64)
        # 1 − β₂ is small: in float32 the difference would lose digits.
        first, second = (1 - tl.exp(n * LOG1)).to(tl.float32), (1 - tl.exp(n * LOG2)).to(tl.float32)
        m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(table + at, mask=inside, other=0.0).to(tl.float32)
        m = m + (1 - BETA1) * (g - m)
        v = BETA2 * v + (1 - BETA2) * g * g
        p = p * (1 - shrink) - rate * (m / first) / (tl.sqrt(v / second) + EPSILON)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        tl.store(table + at, p, mask=inside)


def update_rows_triton(
    table: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    shrink: float,
) -> None:
    """See `update_rows`; contiguous, at most float32."""
    rows, width = table.shape
    torch.autograd.graph.increment_version(table)  # a kernel says nothing to autograd, which may have saved the table
    if rows and width:
        with torch.cuda.device_of(table):
            row_adamw_kernel[(rows,)](
                table, gradient, exp_avg, exp_avg_sq, step, float(rate), float(shrink),
                **constants(betas, epsilon, width), num_warps=warps(width),
            )  # fmt: skip


def warps(width: int) -> int:
    """Warps of a program."""
    return 4 if width <= 2048 else 8


def constants(betas: tuple[float, float], epsilon: float, width: int) -> dict[str, float | int]:
    """What the kernel is compiled for."""
    logarithms = [math.log(beta) if beta else -math.inf for beta in betas]
    return {
        "BETA1": betas[0], "BETA2": betas[1], "LOG1": logarithms[0], "LOG2": logarithms[1],
        "EPSILON": epsilon, "D": width, "BD": triton.next_power_of_2(width),
    }  # fmt: skip
