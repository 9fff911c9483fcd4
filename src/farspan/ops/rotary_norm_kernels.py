"""Triton kernels of the norm of queries and keys together with their rotation: one pass forward, one backward."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _pairs(K: tl.constexpr, INTERLEAVED: tl.constexpr, BK: tl.constexpr):
    """First and second channels of the pairs that rotate, and which pairs there are."""
    pair = tl.arange(0, BK // 2)
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1, pair < K // 2
    else:
        return pair, pair + K // 2, pair < K // 2


@triton.jit
def _read(x, start, first, second, mask):
    return (
        tl.load(x + start + first[None, :], mask=mask, other=0).to(tl.float32),
        tl.load(x + start + second[None, :], mask=mask, other=0).to(tl.float32),
    )


@triton.jit
def _write(x, start, first, second, mask, b_first, b_second):
    tl.store(x + start + first[None, :], b_first.to(x.dtype.element_ty), mask=mask)
    tl.store(x + start + second[None, :], b_second.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _turns(cos, sin, norm, row, real, first, second, there, K: tl.constexpr, BK: tl.constexpr):
    """Rotations `[rows, pairs]` and weights `[pairs]`."""
    pair = tl.arange(0, BK // 2)
    mask = real[:, None] & there[None, :]
    b_cos = tl.load(cos + row[:, None] * (K // 2) + pair[None, :], mask=mask, other=1.0)
    b_sin = tl.load(sin + row[:, None] * (K // 2) + pair[None, :], mask=mask, other=0.0)
    w_first = tl.load(norm + first, mask=there, other=0).to(tl.float32)
    w_second = tl.load(norm + second, mask=there, other=0).to(tl.float32)
    return b_cos, b_sin, w_first[None, :], w_second[None, :]


@triton.jit
def _total(a, b, K: tl.constexpr):
    """Mean over the channels, `[rows, 1]`."""
    return (tl.sum(a, 1) + tl.sum(b, 1))[:, None] / K


@triton.jit
def _forward(x, out, cos, sin, norm, eps, row, real, head, heads, K: tl.constexpr, INTERLEAVED: tl.constexpr,
             HB: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    first, second, there = _pairs(K, INTERLEAVED, BK)
    b_cos, b_sin, w_first, w_second = _turns(cos, sin, norm, row, real, first, second, there, K, BK)
    for n in tl.static_range(HB):
        mask = real[:, None] & there[None, :] & (tl.zeros((1, 1), tl.int32) + head + n < heads)
        start = (row * heads + head + n)[:, None] * K
        b_x, b_y = _read(x, start, first, second, mask)
        times = tl.rsqrt(_total(b_x * b_x, b_y * b_y, K) + eps)
        b_x, b_y = b_x * times * w_first, b_y * times * w_second
        _write(out, start, first, second, mask, b_x * b_cos - b_y * b_sin, b_y * b_cos + b_x * b_sin)


@triton.jit
def _backward(x, d_out, dx, d_norm, cos, sin, norm, eps, row, real, head, heads, K: tl.constexpr,
              INTERLEAVED: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Gradients of some heads of a block of rows, and what they give to the gradient of the weight."""
    first, second, there = _pairs(K, INTERLEAVED, BK)
    b_cos, b_sin, w_first, w_second = _turns(cos, sin, norm, row, real, first, second, there, K, BK)
    dw_first, dw_second = tl.zeros((BK // 2,), tl.float32), tl.zeros((BK // 2,), tl.float32)
    for n in tl.static_range(HB):
        mask = real[:, None] & there[None, :] & (tl.zeros((1, 1), tl.int32) + head + n < heads)
        start = (row * heads + head + n)[:, None] * K
        b_x, b_y = _read(x, start, first, second, mask)
        g_x, g_y = _read(d_out, start, first, second, mask)
        d_x, d_y = g_x * b_cos + g_y * b_sin, g_y * b_cos - g_x * b_sin
        times = tl.rsqrt(_total(b_x * b_x, b_y * b_y, K) + eps)
        b_x, b_y = b_x * times, b_y * times
        dw_first += tl.sum(d_x * b_x, 0)
        dw_second += tl.sum(d_y * b_y, 0)
        d_x, d_y = d_x * w_first, d_y * w_second
        along = _total(d_x * b_x, d_y * b_y, K)
        _write(dx, start, first, second, mask, times * (d_x - b_x * along), times * (d_y - b_y * along))
    tl.store(d_norm + first, dw_first, mask=there)
    tl.store(d_norm + second, dw_second, mask=there)


@triton.jit(do_not_specialize=["rows", "H", "G"])
def normed_kernel(
    q, k, cos, sin, q_norm, k_norm, q_out, k_out, eps, rows, H, G, K: tl.constexpr, INTERLEAVED: tl.constexpr,
    BT: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """q `[rows, H, K]` and k `[rows, G, K]`; a program takes a block of rows of some heads of one of them."""
    head, keys_from = tl.program_id(1) * HB, tl.cdiv(H, HB) * HB
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    if head < H:
        _forward(q, q_out, cos, sin, q_norm, eps, row, row < rows, head, H, K, INTERLEAVED, HB, BK)
    else:
        _forward(k, k_out, cos, sin, k_norm, eps, row, row < rows, head - keys_from, G, K, INTERLEAVED, HB, BK)


@triton.jit(do_not_specialize=["rows", "H", "G"])
def normed_gradient_kernel(
    q, k, cos, sin, q_norm, k_norm, dq_out, dk_out, dq, dk, dq_norm, dk_norm, eps, rows, H, G, K: tl.constexpr,
    INTERLEAVED: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `normed_kernel`; `dq_norm` and `dk_norm` are `[blocks of rows, blocks of heads, K]` float32."""
    head, keys_from = tl.program_id(1) * HB, tl.cdiv(H, HB) * HB
    block = tl.program_id(0).to(tl.int64)
    row = block * BT + tl.arange(0, BT)
    if head < H:
        dq_norm += (block * tl.cdiv(H, HB) + head // HB) * K
        _backward(
            q, dq_out, dq, dq_norm, cos, sin, q_norm, eps, row, row < rows, head, H, K, INTERLEAVED, HB, BK
        )  # fmt: skip
    else:
        head -= keys_from
        dk_norm += (block * tl.cdiv(G, HB) + head // HB) * K
        _backward(
            k, dk_out, dk, dk_norm, cos, sin, k_norm, eps, row, row < rows, head, G, K, INTERLEAVED, HB, BK
        )  # fmt: skip
