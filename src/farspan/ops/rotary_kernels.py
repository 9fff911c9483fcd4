"""Triton kernels of rotation by position: of queries and keys together, and of one vector inside of a decoding step."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _channels(p, o, m, p_weight, b_times, NORMED: tl.constexpr):
    b = tl.load(p + o, mask=m, other=0).to(tl.float32)
    if NORMED:
        b = b * b_times * tl.load(p_weight + o, mask=m, other=0).to(tl.float32)
        b = b.to(p.dtype.element_ty).to(tl.float32)
    return b


@triton.jit
def rotated(
    p, o, m, p_cos, p_sin, R: tl.constexpr, INTERLEAVED: tl.constexpr, p_weight=None, b_times=None,
    NORMED: tl.constexpr = False,
):  # fmt: skip
    """Channels `o` (those in `m`) of the vector at `p`, the first R of them rotated; all of them float32.

    `p_cos` and `p_sin` are R/2 numbers each. Pairs are (j, j + R/2), or (2j, 2j + 1) with `INTERLEAVED`; R = 0 rotates
    nothing. `NORMED`, the vector is multiplied by `b_times` and a weight per channel first, and rounded.
    """
    b = _channels(p, o, m, p_weight, b_times, NORMED)
    if R > 0:
        if INTERLEAVED:
            first = o % 2 == 0
            partner = tl.where(first, o + 1, o - 1)
            pair = o // 2
        else:
            first = o < R // 2
            partner = tl.where(first, o + R // 2, o - R // 2)
            pair = tl.where(first, o, o - R // 2)
        turns = m & (o < R)
        b_partner = _channels(p, partner, turns, p_weight, b_times, NORMED)
        b_cos = tl.load(p_cos + pair, mask=turns, other=1)
        b_sin = tl.load(p_sin + pair, mask=turns, other=0)
        b = b * b_cos + tl.where(first, -b_partner, b_partner) * b_sin
    return b


@triton.jit
def _rotate(x, out, cos, sin, row, real, head, heads, K: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
            BACK: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Some heads of a block of rows; with BACK by the opposite angle. One read of the table serves all of them."""
    pair = tl.arange(0, BK // 2)
    mask = real[:, None] & (pair < R // 2)[None, :]
    b_cos = tl.load(cos + row[:, None] * (R // 2) + pair[None, :], mask=mask, other=1.0)
    b_sin = tl.load(sin + row[:, None] * (R // 2) + pair[None, :], mask=mask, other=0.0)
    if BACK:
        b_sin = -b_sin
    first, second = pair, pair + R // 2
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    for n in tl.static_range(HB):
        here = tl.zeros((1, 1), tl.int32) + head + n < heads
        start = (row * heads + head + n)[:, None] * K
        b_x = tl.load(x + start + first[None, :], mask=mask & here, other=0).to(tl.float32)
        b_y = tl.load(x + start + second[None, :], mask=mask & here, other=0).to(tl.float32)
        b_first, b_second = b_x * b_cos - b_y * b_sin, b_y * b_cos + b_x * b_sin
        tl.store(out + start + first[None, :], b_first.to(out.dtype.element_ty), mask=mask & here)
        tl.store(out + start + second[None, :], b_second.to(out.dtype.element_ty), mask=mask & here)
        if K > R:
            c = R + tl.arange(0, BK)
            alone = real[:, None] & (c < K)[None, :] & here
            tl.store(out + start + c[None, :], tl.load(x + start + c[None, :], mask=alone, other=0), mask=alone)


@triton.jit(do_not_specialize=["rows", "H", "G"])
def rotate_kernel(
    q, k, cos, sin, q_out, k_out, rows, H, G, K: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """q `[rows, H, K]` and k `[rows, G, K]`; a program takes a block of rows of some heads of one of them."""
    head, keys_from = tl.program_id(1) * HB, tl.cdiv(H, HB) * HB
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    if head < H:
        _rotate(q, q_out, cos, sin, row, row < rows, head, H, K, R, INTERLEAVED, BACK, HB, BK)
    else:
        _rotate(k, k_out, cos, sin, row, row < rows, head - keys_from, G, K, R, INTERLEAVED, BACK, HB, BK)
