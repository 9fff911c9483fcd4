"""Triton kernels with one program per chunk and head: outputs and gradients. See `kernels` for formulas and names.

Chunks whose decays exceed the limit are left to `extreme_kernels`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.gated_linear.kernels import (
    INTEGERS,
    LOG_ZERO,
    _gate,
    after_first,
    cumsum,
    exp,
    from_product,
    is_extreme,
    kept_by_walk,
    key_and_decay,
    prefetch,
    sigmoid,
    write_output,
)

# Rows of a chunk up to which sums over them are exact.
FEW = tl.constexpr(8)


@triton.jit(do_not_specialize=INTEGERS)
def output_kernel(
    q_tilde, k_tilde, v, half, u, states, out, rstd, chunks, eps,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, AUGMENT: tl.constexpr,
    INSIDE: tl.constexpr, NORMALIZE: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, with MetaLA's augmentation and norm when asked for."""
    i_c, i_h, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = i_c.to(tl.int64) * H + i_h
    if is_extreme(half, place, K, BK, DECAY, LIMIT):
        return
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    m_t, m_k = (t + o_t) < last, o_k < K
    mask = m_t[:, None] & m_k[None, :]
    m_v = m_t[:, None] & (o_v < V)[None, :]
    base, o_x = row * K, o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q_tilde + base + o_x, mask=mask, other=0.0).to(DOT)
    b_k = tl.load(k_tilde + base + o_x, mask=mask, other=0.0).to(DOT)
    b_v = tl.load(v + row * V + o_t[:, None] * (H * V) + o_v[None, :], mask=m_v, other=0.0)
    p_s = states + place * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = tl.load(p_s, mask=m_k[:, None] & (o_v < V)[None, :], other=0.0).to(DOT)
    b_a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_a = tl.where(o_t[:, None] >= o_t[None, :], b_a, 0.0).to(DOT)
    b_o = tl.dot(b_q, b_s, input_precision=PRECISION)
    b_o += tl.dot(b_a, b_v.to(DOT), input_precision=PRECISION)
    write_output(b_o, b_v, u, out, rstd, row, o_t, o_v, m_t, m_v, eps, H, V, AUGMENT, INSIDE, NORMALIZE, FAST)


@triton.jit(do_not_specialize=INTEGERS)
def row_kernel(
    dy, y, rstd, v, u, d_out, dv, du, rows,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, AUGMENT: tl.constexpr, INSIDE: tl.constexpr,
    NORMALIZE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the norm, `rstd (dy - mean(dy) - y mean(dy y))`, and of the augmentation, for BR rows of V."""
    o_r, o_v = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BV)
    m_r = o_r < rows
    mask = m_r[:, None] & (o_v < V)[None, :]
    offset = o_r[:, None] * V + o_v[None, :]
    b_do = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        b_y = tl.load(y + offset, mask=mask, other=0.0).to(tl.float32)
        b_rstd = tl.load(rstd + o_r, mask=m_r, other=0.0)
        b_do = b_do - (tl.sum(b_do, axis=1) / V)[:, None] - b_y * (tl.sum(b_do * b_y, axis=1) / V)[:, None]
        b_do *= b_rstd[:, None]
        tl.store(d_out + offset, b_do.to(d_out.dtype.element_ty), mask=mask)
    if AUGMENT:
        b_u = tl.load(u + o_r, mask=m_r, other=0.0)
        b_v = tl.load(v + offset, mask=mask, other=0.0).to(tl.float32)
        if INSIDE:
            b_r = sigmoid(b_u[:, None] * b_v, FAST)
            b_slope = b_do * (b_r - b_r * b_r)
            b_dv, b_du = b_u[:, None] * b_slope, tl.sum(b_slope * b_v, axis=1)
        else:
            b_r = sigmoid(b_u, FAST)
            b_dv, b_du = b_r[:, None] * b_do, tl.sum(b_do * b_v, axis=1) * (b_r - b_r * b_r)
        tl.store(dv + offset, b_dv.to(dv.dtype.element_ty), mask=mask)
        tl.store(du + o_r, b_du, mask=m_r)


@triton.jit
def sum_of_few(q, gate, du, row, count, o_k, m_k, tau, H, K: tl.constexpr, FAST: tl.constexpr):
    """`sum_t du_t q_t k_t` of so few rows that the rounding of k~ to 16 bits is not averaged away."""
    b_sum = tl.zeros(o_k.shape, tl.float32)
    for i in range(count):
        offset = (row + i * H) * K + o_k
        b_q = tl.load(q + offset, mask=m_k, other=0.0).to(tl.float32)
        _, b_k = _gate(tl.load(gate + offset, mask=m_k, other=0.0).to(tl.float32), tau, FAST)
        b_sum += tl.load(du + row + i * H) * b_q * b_k
    return b_sum


@triton.jit
def head_decay(gate, half, o_t, m_t, H):
    """`G - m` of a chunk with one decay per head."""
    b_g = tl.maximum(tl.load(gate + o_t * H, mask=m_t, other=0.0).to(half.dtype.element_ty), LOG_ZERO)
    return tl.cumsum(b_g, axis=0) - tl.sum(b_g, axis=0) - tl.load(half)


@triton.jit
def head_decay_gradient(
    q, k, mask, o_t, b_offset, b_dq, b_dk, b_da, b_kept, scale,
    FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one decay per head, from those of q~ and k~ by the states alone and from `do v^T`."""
    b_q, b_k = tl.load(q, mask=mask, other=0.0), tl.load(k, mask=mask, other=0.0)
    b_read = tl.sum(b_q.to(tl.float32) * b_dq, axis=1) * exp(b_offset, FAST) * scale
    b_written = tl.sum(b_k.to(tl.float32) * b_dk, axis=1) * exp(-b_offset, FAST)
    b_pairs = tl.dot(b_q.to(DOT), tl.trans(b_k.to(DOT)), input_precision=PRECISION) * b_da
    b_pairs *= exp(b_offset[:, None] - b_offset[None, :], FAST) * scale
    b_pairs = tl.where(o_t[:, None] > o_t[None, :], b_pairs, 0.0)
    b_net = b_read - b_written + tl.sum(b_pairs, axis=1) - tl.sum(b_pairs, axis=0)
    return tl.cumsum(b_net, axis=0, reverse=True) + tl.sum(b_written, axis=0) + tl.sum(b_kept, axis=0)


@triton.jit(do_not_specialize=INTEGERS)
def gradient_kernel(
    q, k, q_tilde, k_tilde, v, gate, half, weight, d_out, states, d_states, dq, dk, d_gate, du, d_weight, kept,
    chunks, scale, tau,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, AUGMENT: tl.constexpr, KEPT: tl.constexpr, BLOCKS: tl.constexpr,
    TOGETHER: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk for all but v; with a decay per channel, those of BK channels."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    place = i_c.to(tl.int64) * H + i_h
    if is_extreme(half, place, K, BK, DECAY, LIMIT):
        return
    o_k, o_t = tl.program_id(2) * BK + tl.arange(0, BK), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    own = place * (K * V)
    m_t, m_k = (t + o_t) < last, o_k < K
    mask = m_t[:, None] & m_k[None, :]
    base, o_x = row * K, o_t[:, None] * (H * K) + o_k[None, :]
    o_row = base + tl.program_id(2) * BK + tl.minimum(o_t, last - t - 1) * (H * K)
    prefetch(q_tilde + o_row, FAST)
    prefetch(k_tilde + o_row, FAST)
    if DECAY >= 2:
        prefetch(gate + o_row, FAST)
    # What needs the decays comes last: registers are what this kernel is short of.
    b_da, b_dat = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    b_dq, b_dk = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    b_kept = tl.zeros([BK], tl.float32)
    blocks: tl.constexpr = (V + BV - 1) // BV
    together: tl.constexpr = blocks if TOGETHER else 1  # no loop, or reads of sums between products serialise these
    steps = blocks
    if DECAY < 2 and not TOGETHER:
        # Steps of a loop whose number is known are written out and read everything at once; `last` is never taken.
        steps = tl.where(last > t, blocks, last)
    for i_v in range(0, steps, together):
        for i_o in tl.static_range(together):
            o_v = (i_v + i_o) * BV + tl.arange(0, BV)
            m_v = m_t[:, None] & (o_v < V)[None, :]
            m_s = (o_v < V)[:, None] & m_k[None, :]
            o_y, o_s = o_t[:, None] * (H * V) + o_v[None, :], o_v[:, None] + o_k[None, :] * V
            b_v = tl.load(v + row * V + o_y, mask=m_v, other=0.0).to(DOT)
            b_do = tl.load(d_out + row * V + o_y, mask=m_v, other=0.0).to(DOT)
            b_s = tl.load(states + own + o_s, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
            b_ds = tl.load(d_states + own + o_s, mask=m_s, other=0.0).to(DOT)
            b_da = tl.dot(b_do, tl.trans(b_v), b_da, input_precision=PRECISION)
            b_dat = tl.dot(b_v, tl.trans(b_do), b_dat, input_precision=PRECISION)
            b_dq = tl.dot(b_do, b_s, b_dq, input_precision=PRECISION)
            b_dk = tl.dot(b_v, b_ds, b_dk, input_precision=PRECISION)
            if DECAY != 0 and not KEPT:
                b_kept += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=0)
    if KEPT and DECAY == 1:
        b_kept = kept_by_walk(kept, place, o_k, K, BLOCKS)
    if DECAY == 1:
        b_line = head_decay(gate + row, half + place * K, o_t, m_t, H)
        b_net = head_decay_gradient(
            q + base + o_x, k + base + o_x, mask, o_t, b_line, b_dq, b_dk, b_da, b_kept, scale, FAST, DOT, PRECISION
        )  # fmt: skip
        tl.store(d_gate + row + o_t * H, b_net.to(d_gate.dtype.element_ty), mask=m_t)
    b_da = tl.where(o_t[:, None] >= o_t[None, :], b_da, 0.0).to(DOT)
    b_dat = tl.where(o_t[:, None] <= o_t[None, :], b_dat, 0.0).to(DOT)
    b_k = tl.load(k_tilde + base + o_x, mask=mask, other=0.0).to(DOT)
    b_q = tl.load(q_tilde + base + o_x, mask=mask, other=0.0).to(DOT)
    b_at_end = tl.sum(b_k.to(tl.float32) * b_dk, axis=0)
    b_dq = tl.dot(b_da, b_k, b_dq, input_precision=PRECISION)
    b_dk = tl.dot(b_dat, b_q, b_dk, input_precision=PRECISION)
    if AUGMENT:
        # With their decays as they are: those of queries and keys cancel.
        b_du = tl.load(du + row + o_t * H, mask=m_t, other=0.0)[:, None] / scale
        b_w = tl.load(weight + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
        b_dq += b_du * b_w * b_k.to(tl.float32)
        b_dk += b_du * b_w * b_q.to(tl.float32)
        b_dw = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32) * b_du, axis=0)
        tl.store(d_weight + place * K + o_k, b_dw, mask=o_k < tl.where(last - t > FEW, K, 0))
    if DECAY == 0:
        tl.store(dq + base + o_x, (b_dq * scale).to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + base + o_x, b_dk.to(dk.dtype.element_ty), mask=mask)
    else:
        if DECAY == 1:
            b_offset = b_line[:, None]
        else:
            b_dg = cumsum(b_q.to(tl.float32) * b_dq - b_k.to(tl.float32) * b_dk, True, BT, FAST, PART)
            if KEPT:
                b_kept += kept_by_walk(kept, place, o_k, K, BLOCKS)
            b_dg += (b_at_end + b_kept)[None, :]
            b_z, _, b_g = key_and_decay(
                k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, FAST
            )  # fmt: skip
            b_half = tl.load(half + place * K + o_k, mask=m_k, other=0.0)
            b_g = b_g.to(half.dtype.element_ty)
            b_offset = after_first(b_g, BT, FAST, PART) + b_half[None, :]
        b_dq *= exp(b_offset, FAST) * scale
        b_dk *= exp(-b_offset, FAST)
        tl.store(dq + base + o_x, b_dq.to(dq.dtype.element_ty), mask=mask)
        if DECAY == 3:
            b_g = from_product(b_g, BT, FAST, PART)
            if FAST == 0:
                b_away = sigmoid(-tl.minimum(b_z, 80.0), FAST)  # of rows behind the last, e^-z would overflow
            else:
                b_away = 1 - exp(b_g * tau, FAST)
            b_dz = (b_dg - exp(b_g, FAST) * b_dk) * b_away * (1 / tau)
            tl.store(d_gate + base + o_x, b_dz.to(d_gate.dtype.element_ty), mask=mask)
        else:
            tl.store(dk + base + o_x, b_dk.to(dk.dtype.element_ty), mask=mask)
            if DECAY == 2:
                tl.store(d_gate + base + o_x, b_dg.to(d_gate.dtype.element_ty), mask=mask)
    if AUGMENT and last - t <= FEW:
        b_dw = sum_of_few(k, gate, du, row, last - t, o_k, m_k, tau, H, K, FAST)
        tl.store(d_weight + place * K + o_k, b_dw, mask=m_k)
