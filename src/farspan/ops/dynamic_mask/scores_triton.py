"""Triton kernel of the biases and rankings of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.ops.dynamic_mask.scores import LARGEST_EXPONENT

# Rows of a program where there are many, from how many on, and channels that it holds at once.
BLOCK, MANY, CHANNELS = 8, 1024, 128


def dynamic_mask_scores_triton(
    x: Tensor, weight: Tensor, offset: Tensor | None, scale: Tensor, exponential: bool
) -> tuple[Tensor, Tensor]:
    """The kernel's form of `dynamic_mask_scores`; arguments as there."""
    x, heads = x.contiguous(), len(weight)
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    bias, ranking = (x.new_empty((*x.shape[:2], heads), dtype=torch.float32) for _ in range(2))
    # Few rows leave the card empty: then every head has a program of its own.
    few = rows < MANY
    block, together = (1, 1) if few else (BLOCK, heads)
    channels = min(triton.next_power_of_2(width), 8 * CHANNELS if few else CHANNELS)
    if rows:
        with torch.cuda.device_of(x):
            scores_kernel[triton.cdiv(rows, block), triton.cdiv(heads, together)](
                x,
                weight.contiguous(),
                scale.contiguous() if offset is None else offset.contiguous(),
                scale.contiguous(),
                bias,
                ranking,
                rows,
                heads,
                D=width,
                BT=block,
                BD=channels,
                HEADS=together,
                BM=triton.next_power_of_2(together),
                OFFSET=offset is not None,
                EXPONENTIAL=exponential,
                LARGEST=LARGEST_EXPONENT,
                num_warps=4,
            )
    return bias, ranking


@triton.jit(do_not_specialize=["rows", "M"])
def scores_kernel(  # type: ignore[no-untyped-def]
    p_x, p_weight, p_offset, p_scale, p_bias, p_ranking, rows, M, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, OFFSET: tl.constexpr, EXPONENTIAL: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Some heads of a block of rows; sums in float64."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    first, o_m, o_d = tl.program_id(1) * HEADS, tl.arange(0, BM), tl.arange(0, BD)
    real, mine = row < rows, first + o_m < M
    z = tl.zeros((BT, BM), tl.float64)
    for start in range(0, D, BD):
        inside = start + o_d < D
        b_x = tl.load(p_x + row[:, None] * D + start + o_d[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        b_x = b_x.to(tl.float64)
        for n in range(HEADS):
            b_w = tl.load(p_weight + (first + n) * D + start + o_d, mask=inside, other=0.0)
            z += tl.where(o_m[None, :] == n, tl.sum(b_x * b_w[None, :], 1)[:, None], 0.0)
    if OFFSET:
        z += tl.load(p_offset + first + o_m, mask=mine, other=0.0)[None, :]
    # log(1 + y) of a small y, whose sum with 1 has lost digits: what the sum kept tells by how much.
    y = tl.exp(tl.minimum(z, 20.0))
    sum_ = 1.0 + y
    kept = sum_ - 1.0
    soft = tl.where(kept == 0.0, y, tl.log(sum_) * (y / tl.where(kept == 0.0, 1.0, kept)))
    soft = tl.where(z > 20.0, z, soft)
    r = tl.load(p_scale + first + o_m, mask=mine, other=0.0).to(tl.float64)[None, :] * soft
    at = row[:, None] * M + first + o_m[None, :]
    there = real[:, None] & mine[None, :]
    tl.store(p_ranking + at, r.to(tl.float32), mask=there)
    b = tl.exp(tl.minimum(r, LARGEST)) if EXPONENTIAL else r
    tl.store(p_bias + at, b.to(tl.float32), mask=there)
