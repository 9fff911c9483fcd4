"""Triton kernel of linear attention without decay: a walk over a segment.

With x the queries, y the keys and z the values of one head, and row scales a and b,

    out_t = a_t (sum_{s <= t} (x_t . y_s) b_s z_s + x_t S),    S_next = S + sum_s y_s^T b_s z_s

and the mirror image in reverse. Outputs and all gradients of cosine attention are such walks, with other tensors in
the places of x, y and z; its unit vectors are row scales. Rows are scaled, never matrices of K columns. Conventions and
names are those of `kernels`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.gated_linear.kernels import INTEGERS, exp

SMALLEST = tl.constexpr(1.2e-38)  # normal number of float32


@triton.jit
def tile_mask(m_rows, m_columns, SIZE: tl.constexpr):
    """Mask of a tile; columns are asked only where they do not fill their block of a power of 2."""
    full: tl.constexpr = m_columns.shape[0] == SIZE
    return m_rows[:, None] if full else m_rows[:, None] & m_columns[None, :]


@triton.jit
def _inverse_norm(b_x, eps):
    b_x = b_x.to(tl.float32)
    return tl.minimum(tl.rsqrt(tl.maximum(tl.sum(b_x * b_x, axis=1), SMALLEST)), 1 / eps)


@triton.jit(do_not_specialize=INTEGERS)
def walk_kernel(
    x, y, z, a, b, log_count, exponent, own, own_scale, start, end, lost, out, parts, x_scale, y_scale, segments, eps,
    H,
    X: tl.constexpr, Z: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, FACTOR: tl.constexpr, JACOBIAN: tl.constexpr,
    REVERSE: tl.constexpr, HAS_START: tl.constexpr, TURNED: tl.constexpr, STORE_OUT: tl.constexpr,
    STORE_END: tl.constexpr, STORE_LOST: tl.constexpr, STORE_SCALES: tl.constexpr, STAGES: tl.constexpr,
    FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks a segment of one head.

    `UNIT` takes x and y as directions, and stores the inverse norms. `JACOBIAN` takes the result as the gradient of a
    direction, and gives that of `own`, the vector itself. `FACTOR` multiplies a (1) or b (2) by
    `e^(-sigmoid(exponent) log_count)`; where it is a, the Jacobian gives each segment's part of the exponent's
    gradient. `TURNED` reads the state where the segment starts as its transpose.
    """
    i_s, i_h, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(segments + 4 * i_s), tl.load(segments + 4 * i_s + 1)
    count = tl.cdiv(last - first, BT)
    o_x, o_z, o_t = tl.arange(0, BX), i_z * BZ + tl.arange(0, BZ), tl.arange(0, BT)
    m_x, m_z = o_x < X, o_z < Z
    m_s = m_x[:, None] & m_z[None, :]
    o_s = o_x[:, None] * Z + o_z[None, :]
    place_s = (i_s.to(tl.int64) * H + i_h) * (X * Z)
    o_tx, o_tz = o_t[:, None] * (H * X) + o_x[None, :], o_t[:, None] * (H * Z) + o_z[None, :]
    b_s = tl.zeros([BX, BZ], tl.float32)
    if HAS_START:
        if TURNED:
            b_s += tl.load(start + place_s + o_x[:, None] + o_z[None, :] * X, mask=m_s, other=0.0).to(tl.float32)
        else:
            b_s += tl.load(start + place_s + o_s, mask=m_s, other=0.0).to(tl.float32)
    if REVERSE:
        sees = o_t[:, None] <= o_t[None, :]
    else:
        sees = o_t[:, None] >= o_t[None, :]
    b_part, b_power = 0.0, 0.0
    if FACTOR != 0:
        b_power = tl.sigmoid(tl.load(exponent + i_h).to(tl.float32))
    for i in tl.range(0, count, num_stages=STAGES):
        t = first + (count - 1 - i if REVERSE else i) * BT
        m_t = (t + o_t) < last
        row = t.to(tl.int64) * H + i_h
        m_tx, m_tz = tile_mask(m_t, m_x, X), tile_mask(m_t, m_z, Z)
        b_y = tl.load(y + row * X + o_tx, mask=m_tx, other=0.0)
        b_z = tl.load(z + row * Z + o_tz, mask=m_tz, other=0.0)
        b_a, b_b = tl.full([BT], 1.0, tl.float32), tl.full([BT], 1.0, tl.float32)
        if A:
            b_a *= tl.load(a + row + o_t * H, mask=m_t, other=0.0)
        if B:
            b_b *= tl.load(b + row + o_t * H, mask=m_t, other=0.0)
        if FACTOR != 0:
            b_count = tl.load(log_count + t + o_t, mask=m_t, other=0.0)
            b_factor = exp(-b_power * b_count, FAST)
        if FACTOR == 1:
            b_a *= b_factor
        if FACTOR == 2:
            b_b *= b_factor
        if UNIT:
            b_ry = _inverse_norm(b_y, eps)
            b_b *= b_ry
        b_zb = b_z.to(tl.float32) * b_b[:, None]
        if STORE_OUT:
            b_x = tl.load(x + row * X + o_tx, mask=m_tx, other=0.0)
            if UNIT:
                b_rx = _inverse_norm(b_x, eps)
                b_a *= b_rx
                if STORE_SCALES:  # a number a head: 32 bytes of memory are written for each
                    m_first = (t + o_t) < tl.where(i_z == 0, last, 0)
                    tl.store(x_scale + row + o_t * H, b_rx, mask=m_first)
                    tl.store(y_scale + row + o_t * H, b_ry, mask=m_first)
            early: tl.constexpr = JACOBIAN and FAST == 0 and BT < 64  # the order that spills less of halved chunks
            if early:
                b_o = tl.dot(b_x.to(DOT), b_s.to(DOT), input_precision=PRECISION)
            b_xy = tl.dot(b_x.to(DOT), tl.trans(b_y).to(DOT), input_precision=PRECISION)
            if not early:
                b_o = tl.dot(b_x.to(DOT), b_s.to(DOT), input_precision=PRECISION)
            b_xy = tl.where(sees, b_xy, 0.0)
            if not JACOBIAN:
                b_xy, b_o = b_xy * b_a[:, None], b_o * b_a[:, None]
            b_o = tl.dot(b_xy.to(DOT), b_zb.to(DOT), b_o, input_precision=PRECISION)
            if JACOBIAN:
                b_r = tl.load(own_scale + row + o_t * H, mask=m_t, other=0.0)
                b_n = tl.load(own + row * Z + o_tz, mask=m_tz, other=0.0).to(tl.float32) * b_r[:, None]
                b_dot = tl.sum(b_n * b_o, axis=1)
                if FACTOR == 1:
                    b_part -= tl.sum(b_dot * b_factor * b_count, axis=0)
                b_dot = tl.where(b_r * eps < 1, b_dot, 0.0)
                b_o = (b_o - b_n * b_dot[:, None]) * (b_a * b_r)[:, None]
            tl.store(out + row * Z + o_tz, b_o.to(out.dtype.element_ty), mask=m_tz)
        b_s = tl.dot(tl.trans(b_y).to(DOT), b_zb.to(DOT), b_s, input_precision=PRECISION)
    if JACOBIAN and FACTOR == 1:
        tl.store(parts + i_s * H + i_h, b_part * (b_power - b_power * b_power))
    if STORE_END:
        tl.store(end + place_s + o_s, b_s, mask=m_s)
    if STORE_LOST:
        o_lost = (i_s.to(tl.int64) * H + i_h) * X + o_x
        tl.store(lost + o_lost, tl.zeros([BX], tl.float32), mask=m_x)
