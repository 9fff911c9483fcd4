"""Triton kernels of state space duality, backward: one program per chunk and group of heads.

With the letters of `kernels`, and dS from the walk in reverse,

    dc_t = sum_s L_ts (dy_t . x_s) w_s b_s + e^(G_t) dy_t S^T
    db_s = w_s (sum_t L_ts (x_s . dy_t) c_t + e^(G_last - G_s) x_s dS^T)
    dx_s = w_s dx'_s + d dy_s,    dx'_s = sum_t L_ts (b_s . c_t) dy_t + e^(G_last - G_s) b_s dS,    dw_s = x_s . dx'_s
    dg_t = sum_{s >= t} (c_s . dc_s - b_s . db_s) + <S_next, dS>    (c . dc and b . db of the head alone)

dc and db are one kernel, which `LATER` turns round; both are summed over the heads in registers.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.gated_linear.walk_kernels import tile_mask
from farspan.ops.ssd.kernels import UNSPECIALISED, between, decays, power, product, softplus


@triton.jit(do_not_specialize=UNSPECIALISED)
def shared_gradient_kernel(
    other, own, mine, theirs, step, total, states, gradient, asked, chunks, H, R, rows,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LATER: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of queries (from keys, dy, x and the states), or of keys (from queries, x, dy and their gradients).

    The former gives the head's c . dc by the states alone too, of `own` queries.
    """
    i_c, i_g = tl.program_id(0), tl.program_id(1)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    m_t, m_k, m_v = (t + o_t) < last, o_k < K, o_v < V
    groups = H // R
    o_y, o_s = o_t[:, None] * (H * V) + o_v[None, :], o_k[:, None] * V + o_v[None, :]
    o_x, place_x = o_t[:, None] * (groups * K) + o_k[None, :], (t.to(tl.int64) * groups + i_g) * K
    m_x, m_y, m_s = tile_mask(m_t, m_k, K), tile_mask(m_t, m_v, V), tile_mask(m_k, m_v, V)
    b_other = tl.load(other + place_x + o_x, mask=m_x, other=0.0).to(DOT)
    if not LATER:
        b_own = tl.load(own + place_x + o_x, mask=m_x, other=0.0).to(DOT)
    b_d = tl.zeros([BT, BK], tl.float32)
    for i_r in tl.range(0, R, num_stages=STAGES):
        i_h = i_g * R + i_r
        place_y, place_s = (t.to(tl.int64) * H + i_h) * V, (i_c.to(tl.int64) * H + i_h) * (K * V)
        b_mine = tl.load(mine + place_y + o_y, mask=m_y, other=0.0)
        b_theirs = tl.load(theirs + place_y + o_y, mask=m_y, other=0.0).to(DOT)
        b_s = tl.load(states + place_s + o_s, mask=m_s, other=0.0).to(DOT)
        place = i_h.to(tl.int64) * rows + t
        b_w = tl.load(step + place + o_t, mask=m_t, other=0.0)
        b_total, b_all = decays(total, place, o_t, m_t, t, last, BT)
        b_pairs = tl.dot(b_mine.to(DOT), tl.trans(b_theirs), input_precision=PRECISION) * between(b_total, b_all, LATER)
        if LATER:
            sees, b_lost = o_t[:, None] <= o_t[None, :], power(b_all - b_total) * b_w
            b_pairs *= b_w[:, None]
        else:
            sees, b_lost = o_t[:, None] >= o_t[None, :], power(b_total)
            b_pairs *= b_w[None, :]
            b_read = tl.dot(b_own, b_s, input_precision=PRECISION) * b_lost[:, None]
            tl.store(asked + place + o_t, tl.sum(b_read * b_mine.to(tl.float32), axis=1), mask=m_t)
        b_d = product(tl.where(sees, b_pairs, 0.0).to(DOT), b_other, 1.0, b_d, PRECISION)
        b_rest = (b_mine.to(tl.float32) * b_lost[:, None]).to(DOT)
        b_d = product(b_rest, tl.trans(b_s), 1.0, b_d, PRECISION)
    tl.store(gradient + place_x + o_x, b_d.to(gradient.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=UNSPECIALISED)
def value_gradient_kernel(
    q, k, v, skip, step, total, d_out, d_states, dv, dw, net, left, skipped, chunks, H, R, rows,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HAS_SKIP: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of values of one chunk and group; and for `step_gradient_kernel`, all `[H, rows]`,

    dw, w db . b by what leaves the chunk (`left`), c . dc by pairs of rows less all of w db . b (`net`), and x . dy.
    """
    i_c, i_g = tl.program_id(0), tl.program_id(1)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    m_t, m_k, m_v = (t + o_t) < last, o_k < K, o_v < V
    groups = H // R
    o_y, o_s = o_t[:, None] * (H * V) + o_v[None, :], o_k[:, None] * V + o_v[None, :]
    o_x, place_x = o_t[:, None] * (groups * K) + o_k[None, :], (t.to(tl.int64) * groups + i_g) * K
    m_x, m_y, m_s = tile_mask(m_t, m_k, K), tile_mask(m_t, m_v, V), tile_mask(m_k, m_v, V)
    b_q = tl.load(q + place_x + o_x, mask=m_x, other=0.0).to(DOT)
    b_k = tl.load(k + place_x + o_x, mask=m_x, other=0.0).to(DOT)
    b_kq = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    # What a row gives itself does not decay, and would drown the gradient of the decay: it is taken by itself.
    b_itself = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_kq, 0.0), axis=1)
    b_kq = tl.where(o_t[:, None] < o_t[None, :], b_kq, 0.0)
    # Wide blocks leave no registers for what could be computed once.
    for i_r in tl.range(0, R, num_stages=STAGES, disable_licm=BV > 64):
        i_h = i_g * R + i_r
        row = t.to(tl.int64) * H + i_h
        place, place_y, place_s = i_h.to(tl.int64) * rows + t, row * V, (i_c.to(tl.int64) * H + i_h) * (K * V)
        b_do = tl.load(d_out + place_y + o_y, mask=m_y, other=0.0)
        b_v = tl.load(v + place_y + o_y, mask=m_y, other=0.0)
        b_ds = tl.load(d_states + place_s + o_s, mask=m_s, other=0.0).to(DOT)
        b_w = tl.load(step + place + o_t, mask=m_t, other=0.0)
        b_total, b_all = decays(total, place, o_t, m_t, t, last, BT)
        b_at = b_kq * between(b_total, b_all, True)
        b_pairs = tl.dot(b_v.to(DOT), tl.trans(b_do.to(DOT)), input_precision=PRECISION) * b_at
        b_dw = tl.sum(b_pairs, axis=1)
        b_net = tl.sum(b_pairs * b_w[:, None], axis=0)
        b_dv = tl.dot(b_k, b_ds, input_precision=PRECISION) * power(b_all - b_total)[:, None]
        b_left = tl.sum(b_dv * b_v.to(tl.float32), axis=1)
        b_dv = product(b_at.to(DOT), b_do.to(DOT), 1.0, b_dv, PRECISION) * b_w[:, None]
        b_vdo = tl.sum(b_v.to(tl.float32) * b_do.to(tl.float32), axis=1)
        b_own = b_itself * b_w
        if HAS_SKIP:
            b_own += tl.load(skip + i_h).to(tl.float32)
        b_dv += b_own[:, None] * b_do.to(tl.float32)
        tl.store(dv + place_y + o_y, b_dv.to(dv.dtype.element_ty), mask=m_y)
        b_dw += b_left
        tl.store(net + place + o_t, b_net - b_dw * b_w, mask=m_t)
        tl.store(dw + place + o_t, b_dw + b_itself * b_vdo, mask=m_t)
        tl.store(left + place + o_t, b_left * b_w, mask=m_t)
        tl.store(skipped + place + o_t, b_vdo, mask=m_t)


@triton.jit(do_not_specialize=UNSPECIALISED)
def step_gradient_kernel(
    dt, a, bias, step, asked, net, left, dw, skipped, kept, d_dt, parts, chunks, low, high, H, rows,
    BT: tl.constexpr, BH: tl.constexpr, BIASED: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gradient of dt of one chunk and block of heads, and the chunk's part of those of a, d and the bias."""
    i_c, o_h, o_t = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BT)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    m_h, m = o_h < H, ((t + o_t) < last)[:, None] & (o_h < H)[None, :]
    place = o_h.to(tl.int64)[None, :] * rows + (t + o_t)[:, None]
    b_dg = tl.load(asked + place, mask=m, other=0.0) + tl.load(net + place, mask=m, other=0.0)
    b_end = tl.sum(tl.load(left + place, mask=m, other=0.0), axis=0)
    for i_v in tl.static_range(BLOCKS):
        b_end += tl.load(kept + (i_c * H + o_h) * BLOCKS + i_v, mask=m_h, other=0.0)
    b_dg = tl.cumsum(b_dg, axis=0, reverse=True) + b_end[None, :]
    b_a = tl.load(a + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_d = tl.load(dw + place, mask=m, other=0.0) + b_a[None, :] * b_dg
    o_dt = t.to(tl.int64) * H + o_t[:, None] * H + o_h[None, :]
    b_raw = tl.load(dt + o_dt, mask=m, other=0.0).to(tl.float32)
    if BIASED:
        b_raw += tl.load(bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_step = softplus(b_raw) if SOFTPLUS else b_raw
    b_d = tl.where((b_step >= low) & (b_step <= high) & m, b_d, 0.0)
    if SOFTPLUS:
        b_d *= tl.sigmoid(b_raw)
    tl.store(d_dt + o_dt, b_d.to(d_dt.dtype.element_ty), mask=m)
    p_parts = parts + 3 * i_c * H + o_h
    tl.store(p_parts, tl.sum(b_dg * tl.load(step + place, mask=m, other=0.0), axis=0), mask=m_h)
    tl.store(p_parts + H, tl.sum(tl.load(skipped + place, mask=m, other=0.0), axis=0), mask=m_h)
    tl.store(p_parts + 2 * H, tl.sum(b_d, axis=0), mask=m_h)
