"""Triton kernel that turns queries and keys by their places, as complex numbers of pairs of channels."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _turn(x, out, cos, sin, token, row, real, head, heads, K: tl.constexpr, BACK: tl.constexpr, HB: tl.constexpr,
          BK: tl.constexpr):  # fmt: skip
    """Some heads of a block of tokens, times the factors of their places or, with BACK, their conjugates."""
    pair, channel = tl.arange(0, BK // 2), tl.arange(0, BK)
    known = real[:, None] & (pair < K // 2)[None, :]
    factor = row[:, None] * (K // 2) + pair[None, :]
    b_cos = tl.load(cos + factor, mask=known, other=0.0)
    b_sin = tl.load(sin + factor, mask=known, other=0.0)
    if BACK:
        b_sin = -b_sin
    for n in tl.static_range(HB):
        here = tl.zeros((1, 1), tl.int32) + head + n < heads
        fits = real[:, None] & (channel < K)[None, :] & here
        at = (token * heads + head + n)[:, None] * K + channel[None, :]
        b_x = tl.load(x + at, mask=fits, other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_x, (token.shape[0], BK // 2, 2)))
        b_turned = tl.join(b_a * b_cos - b_b * b_sin, b_a * b_sin + b_b * b_cos)
        tl.store(out + at, tl.reshape(b_turned, (token.shape[0], BK)).to(out.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["count", "window", "H", "G"])
def turn_kernel(
    q, k, q_out, k_out, factors, places, count, window, H, G,
    K: tl.constexpr, BACK: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """q `[count, H, K]` and k `[count, G, K]`; a program takes a block of tokens of some heads of one of them.

    `factors` are `[4, window, K/2]`: real and imaginary parts for queries, then for keys; a token takes the row that
    `places` tells.
    """
    head, keys_from = tl.program_id(1) * HB, tl.cdiv(H, HB) * HB
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    real = token < count
    row = tl.load(places + token, mask=real, other=0)
    part = window.to(tl.int64) * (K // 2)
    if head < H:
        _turn(q, q_out, factors, factors + part, token, row, real, head, H, K, BACK, HB, BK)
    else:
        keys = factors + 2 * part
        _turn(k, k_out, keys, keys + part, token, row, real, head - keys_from, G, K, BACK, HB, BK)
