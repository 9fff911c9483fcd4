"""Triton kernel of the biases and rankings of keys."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.ops._launch import Constants, launch
from farspan.ops._library import register_node
from farspan.ops.dynamic_mask.scores import LARGEST_EXPONENT

# Rows of a program where there are many, from how many on, and channels that it holds at once.
BLOCK, MANY, CHANNELS = 8, 1024, 128
# Warps and stages.
SCHEDULE = 4, 3


def dynamic_mask_scores_triton(
    x: Tensor, weight: Tensor, offset: Tensor | None, scale: Tensor, exponential: bool
) -> tuple[Tensor, Tensor]:
    """The kernel's form of `dynamic_mask_scores`; arguments as there."""
    bias, ranking = scores_node(x, weight, offset, scale, exponential)
    return bias, ranking


def _scores(
    x: Tensor, weight: Tensor, offset: Tensor | None, scale: Tensor, exponential: bool
) -> tuple[Tensor, Tensor]:
    (batch, length, width), heads = x.shape, len(weight)
    made = _room(x, weight)
    # Few rows leave the card empty: then every head has a program of its own.
    rows = batch * length
    few = rows < MANY
    block, together = (1, 1) if few else (BLOCK, heads)
    channels = min(triton.next_power_of_2(width), 8 * CHANNELS if few else CHANNELS)
    constants = _constants(width, block, channels, together, offset is not None, exponential)
    scale = scale.contiguous()
    given = x.contiguous(), weight.contiguous(), scale if offset is None else offset.contiguous(), scale
    grid = triton.cdiv(rows, block), triton.cdiv(heads, together)
    launch(scores_kernel, grid, (*given, *made, rows, heads), constants, *SCHEDULE)
    return made


@functools.cache
def _constants(width: int, rows: int, channels: int, heads: int, offset: bool, exponential: bool) -> Constants:
    tile = {"D": width, "BT": rows, "BD": channels, "HEADS": heads, "BM": triton.next_power_of_2(heads)}
    return Constants(**tile, OFFSET=offset, EXPONENTIAL=exponential, LARGEST=LARGEST_EXPONENT)


def _room(x: Tensor, weight: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    bias, ranking = (x.new_empty((*x.shape[:2], weight.shape[0]), dtype=torch.float32) for _ in range(2))
    return bias, ranking


scores_node = register_node(
    "dynamic_mask_scores(Tensor x, Tensor weight, Tensor? offset, Tensor scale, bool exponential) "
    "-> (Tensor bias, Tensor ranking)",
    _scores,
    _room,
)


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
