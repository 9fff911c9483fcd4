"""Triton kernels of state space duality: one program per chunk and group of heads.

A program goes through the heads of its group. What they share, the products of queries c and keys b, is formed once,
and the gradient of c or b is summed in registers. With G the inclusive sum of log decays in the chunk, w the weights of
the values x, L_ts = e^(G_t - G_s) for s <= t, S the state entering the chunk and dS the gradient of the one leaving it,

    y_t  = sum_s L_ts (c_t . b_s) w_s x_s + e^(G_t) c_t S + d x_t
    dc_t = sum_s L_ts (dy_t . x_s) w_s b_s + e^(G_t) dy_t S^T
    db_s = w_s (sum_t L_ts (x_s . dy_t) c_t + e^(G_last - G_s) x_s dS^T)
    dx_s = w_s dx'_s + d dy_s,    dx'_s = sum_t L_ts (b_s . c_t) dy_t + e^(G_last - G_s) b_s dS,    dw_s = x_s . dx'_s
    dg_t = sum_{s >= t} (c_s . dc_s - b_s . db_s) + <S_next, dS>    (c . dc and b . db of the head alone)

dc and db are one kernel, which `LATER` turns round. Conventions and names are those of `gated_linear.kernels`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.gated_linear.kernels import INTEGERS, LOG_ZERO, exp


@triton.jit
def _decays(log_decay, row, o_t, m_t, H):
    b_g = tl.maximum(tl.load(log_decay + row + o_t * H, mask=m_t, other=0.0), LOG_ZERO)
    return tl.cumsum(b_g, axis=0), tl.sum(b_g, axis=0)


@triton.jit
def _between(b_total, o_t, LATER: tl.constexpr, FAST: tl.constexpr):
    """What has been lost from the earlier to the later of each pair of rows, and 0 where the column is not asked."""
    if LATER:
        sees, b_gap = o_t[:, None] <= o_t[None, :], b_total[None, :] - b_total[:, None]
    else:
        sees, b_gap = o_t[:, None] >= o_t[None, :], b_total[:, None] - b_total[None, :]
    return tl.where(sees, exp(tl.where(sees, b_gap, 0.0), FAST), 0.0)


@triton.jit(do_not_specialize=(*INTEGERS, "R"))
def output_kernel(
    q, k, v, w, log_decay, skip, states, out, chunks, H, R,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HAS_SKIP: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and group."""
    i_c, i_g = tl.program_id(0), tl.program_id(1)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    m_t, m_k, m_v = (t + o_t) < last, o_k < K, o_v < V
    groups = H // R
    o_x = (t.to(tl.int64) * groups + i_g) * K + o_t[:, None] * (groups * K) + o_k[None, :]
    m_x, m_y = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
    b_q = tl.load(q + o_x, mask=m_x, other=0.0).to(DOT)
    b_k = tl.load(k + o_x, mask=m_x, other=0.0).to(DOT)
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    for i_r in tl.range(0, R, num_stages=STAGES):
        i_h = i_g * R + i_r
        row = t.to(tl.int64) * H + i_h
        o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
        o_s = (i_c.to(tl.int64) * H + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
        b_v = tl.load(v + o_y, mask=m_y, other=0.0)
        b_s = tl.load(states + o_s, mask=m_k[:, None] & m_v[None, :], other=0.0).to(DOT)
        b_w = tl.load(w + row + o_t * H, mask=m_t, other=0.0)
        b_total, _ = _decays(log_decay, row, o_t, m_t, H)
        b_o = tl.dot(b_q, b_s, input_precision=PRECISION) * exp(b_total, FAST)[:, None]
        b_a = (b_qk * _between(b_total, o_t, False, FAST) * b_w[None, :]).to(DOT)
        b_o = tl.dot(b_a, b_v.to(DOT), b_o, input_precision=PRECISION)
        if HAS_SKIP:
            b_o += tl.load(skip + i_h).to(tl.float32) * b_v.to(tl.float32)
        tl.store(out + o_y, b_o.to(out.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=(*INTEGERS, "R"))
def shared_gradient_kernel(
    other, mine, theirs, w, log_decay, states, gradient, chunks, H, R,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LATER: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of queries (from keys, dy, x and the states), or of keys (from queries, x, dy and their gradients)."""
    i_c, i_g = tl.program_id(0), tl.program_id(1)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    m_t, m_k, m_v = (t + o_t) < last, o_k < K, o_v < V
    groups = H // R
    o_x = (t.to(tl.int64) * groups + i_g) * K + o_t[:, None] * (groups * K) + o_k[None, :]
    m_x, m_y = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
    b_other = tl.load(other + o_x, mask=m_x, other=0.0).to(DOT)
    b_d = tl.zeros([BT, BK], tl.float32)
    for i_r in tl.range(0, R, num_stages=STAGES):
        row = t.to(tl.int64) * H + i_g * R + i_r
        o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
        o_s = (i_c.to(tl.int64) * H + i_g * R + i_r) * (K * V) + o_k[:, None] * V + o_v[None, :]
        b_mine = tl.load(mine + o_y, mask=m_y, other=0.0).to(DOT)
        b_theirs = tl.load(theirs + o_y, mask=m_y, other=0.0).to(DOT)
        b_s = tl.load(states + o_s, mask=m_k[:, None] & m_v[None, :], other=0.0).to(DOT)
        b_w = tl.load(w + row + o_t * H, mask=m_t, other=0.0)
        b_total, b_all = _decays(log_decay, row, o_t, m_t, H)
        b_pairs = tl.dot(b_mine, tl.trans(b_theirs), input_precision=PRECISION) * _between(b_total, o_t, LATER, FAST)
        if LATER:
            b_pairs, b_lost = b_pairs * b_w[:, None], exp(b_all - b_total, FAST) * b_w
        else:
            b_pairs, b_lost = b_pairs * b_w[None, :], exp(b_total, FAST)
        b_d = tl.dot(b_pairs.to(DOT), b_other, b_d, input_precision=PRECISION)
        b_d += tl.dot(b_mine, tl.trans(b_s), input_precision=PRECISION) * b_lost[:, None]
    tl.store(gradient + o_x, b_d.to(gradient.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=(*INTEGERS, "R"))
def value_gradient_kernel(
    q, k, v, w, log_decay, skip, d_out, states, d_states, dv, dw, d_decay, d_skip, chunks, H, R,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HAS_SKIP: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of values, weights, decays and skip of one chunk and group."""
    i_c, i_g = tl.program_id(0), tl.program_id(1)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    m_t, m_k, m_v = (t + o_t) < last, o_k < K, o_v < V
    groups = H // R
    o_x = (t.to(tl.int64) * groups + i_g) * K + o_t[:, None] * (groups * K) + o_k[None, :]
    m_x, m_y, m_s = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :], m_k[:, None] & m_v[None, :]
    b_q = tl.load(q + o_x, mask=m_x, other=0.0).to(DOT)
    b_k = tl.load(k + o_x, mask=m_x, other=0.0).to(DOT)
    b_kq = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    for i_r in tl.range(0, R, num_stages=STAGES):
        i_h = i_g * R + i_r
        row = t.to(tl.int64) * H + i_h
        o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
        o_s = (i_c.to(tl.int64) * H + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
        b_do = tl.load(d_out + o_y, mask=m_y, other=0.0)
        b_ds = tl.load(d_states + o_s, mask=m_s, other=0.0)
        b_s = tl.load(states + o_s, mask=m_s, other=0.0)
        b_w = tl.load(w + row + o_t * H, mask=m_t, other=0.0)
        b_total, b_all = _decays(log_decay, row, o_t, m_t, H)
        b_kept = exp(b_all, FAST) * tl.sum(tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1), axis=0)
        b_read = tl.dot(b_q, b_s.to(DOT), input_precision=PRECISION) * exp(b_total, FAST)[:, None]
        b_asked = tl.sum(b_read * b_do.to(tl.float32), axis=1)
        b_dv = tl.dot(b_k, b_ds.to(DOT), input_precision=PRECISION) * exp(b_all - b_total, FAST)[:, None]
        b_v = tl.load(v + o_y, mask=m_y, other=0.0)
        b_written = b_w * tl.sum(b_dv * b_v.to(tl.float32), axis=1)
        b_kept += tl.sum(b_written, axis=0)
        b_at = b_kq * _between(b_total, o_t, True, FAST)
        b_dv = tl.dot(b_at.to(DOT), b_do.to(DOT), b_dv, input_precision=PRECISION)
        # Pairs of different rows alone: what a row gives itself does not decay, and would drown the rest.
        b_pairs = tl.dot(b_v.to(DOT), tl.trans(b_do.to(DOT)), input_precision=PRECISION) * b_at * b_w[:, None]
        b_pairs = tl.where(o_t[:, None] < o_t[None, :], b_pairs, 0.0)
        b_asked += tl.sum(b_pairs, axis=0)
        b_written += tl.sum(b_pairs, axis=1)
        b_dg = tl.cumsum(b_asked - b_written, axis=0, reverse=True) + b_kept
        tl.store(d_decay + row + o_t * H, b_dg, mask=m_t)
        b_v32, b_do32 = b_v.to(tl.float32), b_do.to(tl.float32)
        tl.store(dw + row + o_t * H, tl.sum(b_dv * b_v32, axis=1), mask=m_t)
        b_dv *= b_w[:, None]
        if HAS_SKIP:
            b_dv += tl.load(skip + i_h).to(tl.float32) * b_do32
            tl.store(d_skip + i_c * H + i_h, tl.sum(tl.sum(b_do32 * b_v32, axis=1), axis=0))
        tl.store(dv + o_y, b_dv.to(dv.dtype.element_ty), mask=m_y)
