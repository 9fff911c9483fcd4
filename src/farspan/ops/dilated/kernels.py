"""Triton kernels that join what the boxes of dilated attention give: outputs by their log-sum-exps, gradients by sum.

One program takes a block of tokens of one head, and reads of every box that has the head the rows that it selects.
Periods and dilations are known at compile time: a division by a number that is not takes as long as a memory access.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _locate(table, index, token, head, PERIOD: tl.constexpr, DILATION: tl.constexpr, NUMBERS: tl.constexpr):
    """Whether a box has the head, which of the tokens it selects, and their rows: by head and by token."""
    box = table + index * NUMBERS
    begin, length, rows = tl.load(box), tl.load(box + 1), tl.load(box + 2)
    first, step, count = tl.load(box + 3), tl.load(box + 4), tl.load(box + 5)
    offset, rise = tl.load(box + 6), tl.load(box + 7)
    behind = head - first
    slot = behind // step
    has_head = (behind >= 0) & (behind % step == 0) & (slot < count)
    inside = token - begin
    segment = inside // PERIOD
    place = inside % PERIOD - (offset + slot * rise)
    taken = (inside >= 0) & (inside < length) & (place >= 0) & (place % DILATION == 0)
    row = place // DILATION
    return has_head, taken, (segment * count + slot) * rows + row, (segment * rows + row) * count + slot


@triton.jit(do_not_specialize=["first", "end", "tokens", "H"])
def merge_kernel(
    outs, lses, table, out, total, base_lse, first, end, tokens, H,
    PERIODS: tl.constexpr, DILATIONS: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    NUMBERS: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Joins outputs `[n, c, h, D]` with log-sum-exps `[n, h, c]` into `[N, H, D]` and `[H, N]`.

    With BASE > 0, `out` already holds what a pattern that takes every row gives in segments of BASE tokens, and is
    written only where that changes.
    """
    head = tl.program_id(1)
    token = first + tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, BD)
    real, fits = token < end, channel < D
    acc = tl.zeros((BT, BD), tl.float32)
    weight = tl.zeros((BT,), tl.float32)
    top = tl.full((BT,), float("-inf"), tl.float32)
    covered = tl.zeros((BT,), tl.int1)
    for i in tl.static_range(len(outs)):
        has_head, taken, by_head, by_token = _locate(table, i, token, head, PERIODS[i], DILATIONS[i], NUMBERS)
        if has_head:
            taken = taken & real
            covered = covered | taken
            lse = tl.load(lses[i] + by_head, mask=taken, other=float("-inf"))
            part = tl.load(
                outs[i] + by_token.to(tl.int64)[:, None] * D + channel[None, :],
                mask=taken[:, None] & fits[None, :],
                other=0.0,
            ).to(tl.float32)
            higher = tl.maximum(top, lse)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            old, new = tl.exp(top - finite), tl.exp(lse - finite)
            acc = acc * old[:, None] + part * new[:, None]
            weight = weight * old + new
            top = higher
    place = out + (token.to(tl.int64)[:, None] * H + head) * D + channel[None, :]
    written = real
    if BASE > 0:
        written = covered
        lse = tl.load(base_lse + ((token // BASE).to(tl.int64) * H + head) * BASE + token % BASE, mask=real, other=0.0)
        part = tl.load(place, mask=covered[:, None] & fits[None, :], other=0.0).to(tl.float32)
        higher = tl.maximum(top, lse)
        old, new = tl.exp(top - higher), tl.exp(lse - higher)
        acc = acc * old[:, None] + part * new[:, None]
        weight = weight * old + new
        top = higher
    empty = weight == 0.0
    acc = acc / tl.where(empty, 1.0, weight)[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=written[:, None] & fits[None, :])
    lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, weight)))
    tl.store(total + head.to(tl.int64) * tokens + token, lse, mask=real)


@triton.jit(do_not_specialize=["first", "end", "H"])
def sum_kernel(
    parts, table, out, first, end, H,
    PERIODS: tl.constexpr, DILATIONS: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """Adds gradients `[n, c, h, D]` up to `[N, H, D]`; 0 where no box selects a row."""
    head = tl.program_id(1)
    token = first + tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, BD)
    real, fits = token < end, channel < D
    acc = tl.zeros((BT, BD), tl.float32)
    for i in tl.static_range(len(parts)):
        has_head, taken, _, by_token = _locate(table, i, token, head, PERIODS[i], DILATIONS[i], NUMBERS)
        if has_head:
            place = parts[i] + by_token.to(tl.int64)[:, None] * D + channel[None, :]
            acc += tl.load(place, mask=(taken & real)[:, None] & fits[None, :], other=0.0).to(tl.float32)
    place = out + (token.to(tl.int64)[:, None] * H + head) * D + channel[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=real[:, None] & fits[None, :])
