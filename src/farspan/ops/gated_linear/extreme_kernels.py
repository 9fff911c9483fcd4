"""Triton kernels for chunks of extreme decays, which the factorisation about the centre of the chunk cannot hold.

Rows of second halves meet columns of first halves, for halves of 32, 16, ..., 1 rows, so that all exponents are <= 0.
These kernels are launched over all chunks, many to a program, and leave moderate ones alone: their size never burdens
the common case.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.gated_linear.kernels import (
    INTEGERS,
    cumsum,
    is_extreme,
    kept_by_walk,
    key_and_decay,
    sigmoid,
    write_output,
)

MANY = tl.constexpr(16)


@triton.jit
def _add_from(a, a_starts, b, b_starts):
    return tl.where(b_starts != 0, b, a + b), a_starts | b_starts


@triton.jit
def _halves(b_g, o_t, size):
    """What second halves have lost since the middle of their pair, and first halves until it; 0 on the other rows."""
    place = o_t[:, None] % size
    zero = (b_g * 0).to(tl.int32)
    since, _ = tl.associative_scan((b_g, zero + (place == 0).to(tl.int32)), 0, _add_from)
    until, _ = tl.associative_scan((b_g, zero + (place == size - 1).to(tl.int32)), 0, _add_from, reverse=True)
    second = (o_t[:, None] // size) % 2 == 1
    return tl.where(second, tl.exp(since), 0.0), tl.where(second, 0.0, tl.exp(until - b_g))


@triton.jit
def _pairs(o_t, size):
    return (o_t[:, None] // (2 * size)) == (o_t[None, :] // (2 * size))


@triton.jit
def _any_extreme(half, first, count, i_h, H, K: tl.constexpr, BK: tl.constexpr, LIMIT: tl.constexpr):
    o_c, o_k = first + tl.arange(0, MANY), tl.arange(0, BK)
    offset = (o_c.to(tl.int64) * H + i_h)[:, None] * K + o_k[None, :]
    b_half = tl.load(half + offset, mask=(o_c < count)[:, None] & (o_k < K)[None, :], other=0.0)
    return tl.max(tl.max(b_half, axis=1), axis=0) > LIMIT


@triton.jit
def _extreme_output(
    i_c, i_h, i_v, q, k, q_tilde, v, gate, half, u, states, out, rstd, chunks, scale, tau, eps,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr, AUGMENT: tl.constexpr,
    INSIDE: tl.constexpr, NORMALIZE: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One extreme chunk of `extreme_output_kernel`."""
    place = i_c.to(tl.int64) * H + i_h
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    m_t, m_k = (t + o_t) < last, o_k < K
    mask = m_t[:, None] & m_k[None, :]
    m_v = m_t[:, None] & (o_v < V)[None, :]
    o_x = row * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_q32 = tl.load(q + o_x, mask=mask, other=0.0).to(tl.float32) * scale
    b_q = tl.load(q_tilde + o_x, mask=mask, other=0.0).to(DOT)
    b_v = tl.load(v + row * V + o_t[:, None] * (H * V) + o_v[None, :], mask=m_v, other=0.0)
    p_s = states + place * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = tl.load(p_s, mask=m_k[:, None] & (o_v < V)[None, :], other=0.0).to(DOT)
    _, b_k32, b_g = key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, 0)
    b_a = tl.where(o_t[:, None] == o_t[None, :], tl.sum(b_q32 * b_k32, axis=1)[:, None], 0.0)
    for level in range(LEVELS):
        size = BT >> (level + 1)
        b_since, b_until = _halves(b_g, o_t, size)
        b_up, b_down = (b_q32 * b_since).to(DOT), (b_k32 * b_until).to(DOT)
        b_part = tl.dot(b_up, tl.trans(b_down), input_precision=PRECISION)
        b_a += tl.where(_pairs(o_t, size), b_part, 0.0)
    b_a = tl.where(o_t[:, None] >= o_t[None, :], b_a, 0.0).to(DOT)
    b_o = tl.dot(b_q, b_s, input_precision=PRECISION)
    b_o += tl.dot(b_a, b_v.to(DOT), input_precision=PRECISION)
    write_output(b_o, b_v, u, out, rstd, row, o_t, o_v, m_t, m_v, eps, H, V, AUGMENT, INSIDE, NORMALIZE, FAST)


@triton.jit(do_not_specialize=INTEGERS)
def extreme_output_kernel(
    q, k, q_tilde, v, gate, half, u, states, out, rstd, chunks, count, scale, tau, eps,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr, AUGMENT: tl.constexpr,
    INSIDE: tl.constexpr, NORMALIZE: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `output_kernel`, for the extreme ones among `MANY` chunks."""
    i_h, i_v = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * MANY
    if _any_extreme(half, first, count, i_h, H, K, BK, LIMIT):
        for i in range(tl.minimum(MANY, count - first)):
            i_c = first + i
            if is_extreme(half, i_c.to(tl.int64) * H + i_h, K, BK, DECAY, LIMIT):
                _extreme_output(
                    i_c, i_h, i_v, q, k, q_tilde, v, gate, half, u, states, out, rstd, chunks, scale,
                    tau, eps, H, K, V, BT, BK, BV, DECAY, LIMIT, LEVELS, AUGMENT, INSIDE, NORMALIZE,
                    FAST, DOT, PRECISION,
                )  # fmt: skip


@triton.jit
def _extreme_gradient(
    i_c, i_h, q, k, q_tilde, k_tilde, v, gate, half, u, weight, d_out, states, d_states, dq, dk, dv, d_gate, d_weight,
    kept, chunks, scale, tau,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr, AUGMENT: tl.constexpr,
    KEPT: tl.constexpr, BLOCKS: tl.constexpr, INSIDE: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One extreme chunk of `extreme_gradient_kernel`."""
    place = i_c.to(tl.int64) * H + i_h
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_t = tl.arange(0, BK), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    own = place * (K * V)
    m_t, m_k = (t + o_t) < last, o_k < K
    mask = m_t[:, None] & m_k[None, :]
    o_x = row * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_q32 = tl.load(q + o_x, mask=mask, other=0.0).to(tl.float32) * scale
    b_end = tl.load(k_tilde + o_x, mask=mask, other=0.0).to(DOT)
    earlier, later = o_t[:, None] >= o_t[None, :], o_t[:, None] <= o_t[None, :]
    _, b_k32, b_g = key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, 0)
    b_at = tl.where(o_t[:, None] == o_t[None, :], tl.sum(b_q32 * b_k32, axis=1)[:, None], 0.0)
    for level in range(LEVELS):
        size = BT >> (level + 1)
        b_since, b_until = _halves(b_g, o_t, size)
        b_up, b_down = (b_q32 * b_since).to(DOT), (b_k32 * b_until).to(DOT)
        b_at += tl.where(_pairs(o_t, size), tl.dot(b_down, tl.trans(b_up), input_precision=PRECISION), 0.0)
    b_at = tl.where(later, b_at, 0.0).to(DOT)
    b_du, b_u = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    if AUGMENT:
        b_u += tl.load(u + row + o_t * H, mask=m_t, other=0.0)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = m_t[:, None] & (o_v < V)[None, :]
        o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
        b_do = tl.load(d_out + o_y, mask=m_v, other=0.0)
        o_s = own + o_k[:, None] * V + o_v[None, :]
        b_ds = tl.load(d_states + o_s, mask=m_k[:, None] & (o_v < V)[None, :], other=0.0).to(DOT)
        b_dv = tl.dot(b_at, b_do.to(DOT), input_precision=PRECISION)
        b_dv = tl.dot(b_end, b_ds, b_dv, input_precision=PRECISION)
        if AUGMENT:
            b_v, b_do = tl.load(v + o_y, mask=m_v, other=0.0).to(tl.float32), b_do.to(tl.float32)
            if INSIDE:
                b_r = sigmoid(b_u[:, None] * b_v, FAST)
                b_slope = b_do * (b_r - b_r * b_r)
                b_dv += b_u[:, None] * b_slope
                b_du += tl.sum(b_slope * b_v, axis=1)
            else:
                b_dv += tl.sigmoid(b_u)[:, None] * b_do
                b_du += tl.sum(b_do * b_v, axis=1) * tl.sigmoid(b_u) * tl.sigmoid(-b_u)
        tl.store(dv + o_y, b_dv.to(dv.dtype.element_ty), mask=m_v)
    b_da, b_dat = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    b_dq, b_dk = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    b_kept = tl.zeros([BK], tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = m_t[:, None] & (o_v < V)[None, :]
        o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
        b_v = tl.load(v + o_y, mask=m_v, other=0.0).to(DOT)
        b_do = tl.load(d_out + o_y, mask=m_v, other=0.0).to(DOT)
        m_s = (o_v < V)[:, None] & m_k[None, :]
        o_s = own + o_v[:, None] + o_k[None, :] * V
        b_s = tl.load(states + o_s, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
        b_ds = tl.load(d_states + o_s, mask=m_s, other=0.0).to(DOT)
        if not KEPT:
            b_kept += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=0)
        b_da = tl.dot(b_do, tl.trans(b_v), b_da, input_precision=PRECISION)
        b_dat = tl.dot(b_v, tl.trans(b_do), b_dat, input_precision=PRECISION)
        b_dq = tl.dot(b_do, b_s, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_v, b_ds, b_dk, input_precision=PRECISION)
    b_da, b_dat = tl.where(earlier, b_da, 0.0), tl.where(later, b_dat, 0.0)
    # Read again, these need no registers during the products before.
    _, b_k32, b_g = key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, 0)
    b_dq *= tl.exp(tl.cumsum(b_g, axis=0))
    b_dk *= tl.exp(tl.cumsum(b_g, axis=0, reverse=True) - b_g)
    if KEPT:
        b_kept += kept_by_walk(kept, place, o_k, K, BLOCKS)
    b_at_end = b_kept * tl.exp(tl.sum(b_g, axis=0)) + tl.sum(b_k32 * b_dk, axis=0)
    b_same = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_da, 0.0), axis=1)
    b_dq += b_same[:, None] * b_k32
    for level in range(LEVELS):
        size = BT >> (level + 1)
        b_since, b_until = _halves(b_g, o_t, size)
        b_part, b_down = tl.where(_pairs(o_t, size), b_da, 0.0).to(DOT), (b_k32 * b_until).to(DOT)
        b_dq += tl.dot(b_part, b_down, input_precision=PRECISION) * b_since
    b_q32 = tl.load(q + o_x, mask=mask, other=0.0).to(tl.float32) * scale
    b_dk += b_same[:, None] * b_q32
    for level in range(LEVELS):
        size = BT >> (level + 1)
        b_since, b_until = _halves(b_g, o_t, size)
        b_part, b_up = tl.where(_pairs(o_t, size), b_dat, 0.0).to(DOT), (b_q32 * b_since).to(DOT)
        b_dk += tl.dot(b_part, b_up, input_precision=PRECISION) * b_until
    b_dg = cumsum(b_q32 * b_dq - b_k32 * b_dk, True, BT, FAST, PART) + b_at_end[None, :]
    b_dq *= scale
    if AUGMENT:
        b_w = tl.load(weight + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_duq = b_du[:, None] * b_q32 / scale
        tl.store(d_weight + place * K + o_k, tl.sum(b_duq * b_k32, axis=0), mask=m_k)
        b_dq += b_du[:, None] * b_k32 * b_w[None, :]
        b_dk += b_duq * b_w[None, :]
    tl.store(dq + o_x, b_dq.to(dq.dtype.element_ty), mask=mask)
    if DECAY == 3:
        b_z = tl.load(gate + o_x, mask=mask, other=0.0).to(tl.float32)
        b_dz = (b_dg - (1 - b_k32) * b_dk) * sigmoid(-b_z, FAST) * (1 / tau)
        tl.store(d_gate + o_x, b_dz.to(d_gate.dtype.element_ty), mask=mask)
    else:
        tl.store(dk + o_x, b_dk.to(dk.dtype.element_ty), mask=mask)
        if DECAY == 2:
            tl.store(d_gate + o_x, b_dg.to(d_gate.dtype.element_ty), mask=mask)
        if DECAY == 1:
            b_sum = tl.sum(tl.where(m_k[None, :], b_dg, 0.0), axis=1)
            tl.store(d_gate + row + o_t * H, b_sum.to(d_gate.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=INTEGERS)
def extreme_gradient_kernel(
    q, k, q_tilde, k_tilde, v, gate, half, u, weight, d_out, states, d_states, dq, dk, dv, d_gate, d_weight, kept,
    chunks, count, scale, tau,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr, AUGMENT: tl.constexpr,
    KEPT: tl.constexpr, BLOCKS: tl.constexpr, INSIDE: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients, for the extreme ones among `MANY` chunks."""
    i_h = tl.program_id(1)
    first = tl.program_id(0) * MANY
    if _any_extreme(half, first, count, i_h, H, K, BK, LIMIT):
        for i in range(tl.minimum(MANY, count - first)):
            i_c = first + i
            if is_extreme(half, i_c.to(tl.int64) * H + i_h, K, BK, DECAY, LIMIT):
                _extreme_gradient(
                    i_c, i_h, q, k, q_tilde, k_tilde, v, gate, half, u, weight, d_out, states, d_states,
                    dq, dk, dv, d_gate, d_weight, kept, chunks, scale, tau, H, K, V, BT, BK, BV, DECAY,
                    LIMIT, LEVELS, AUGMENT, KEPT, BLOCKS, INSIDE, FAST, PART, DOT, PRECISION,
                )  # fmt: skip
