"""Triton kernels of state space duality, forward: steps and decays, a walk for the states, outputs by chunks.

A program for outputs or gradients goes through the heads of one chunk and group. What they share, the products of
queries c and keys b, is formed once. With w the step sizes, G the inclusive sum of log decays in the chunk,
L_ts = e^(G_t - G_s) for s <= t, S the state entering the chunk and dS the gradient of the one leaving it,

    y_t  = sum_s L_ts (c_t . b_s) w_s x_s + e^(G_t) c_t S + d x_t
    S_next = e^(G_last) S + sum_s e^(G_last - G_s) w_s b_s^T x_s

`gradient_kernels` has the other direction. Step sizes and sums are kept as `[H, rows]` in float32, the sums in units of
ln 2, so that a head reads neighbours and a power of 2 gives the decay. With float32 inputs the sums are float64: the
decay of a pair of rows is a difference of sums, and would be off by what rounding takes from sums in the hundreds.
Other conventions are those of `gated_linear.kernels`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.gated_linear.kernels import INTEGERS, LN2, LOG2E, LOG_ZERO
from farspan.ops.gated_linear.walk_kernels import tile_mask

UNSPECIALISED = (*INTEGERS, "R")


@triton.jit
def softplus(x):
    """`ln(1 + e^x)`; the series keeps what 1 + e^-|x| would round away."""
    b_e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(b_e < 0.01, b_e * (1 - b_e * (0.5 - b_e * (1.0 / 3))), tl.log(1 + b_e))


@triton.jit
def decays(total, place, o_t, m_t, t, last, BT: tl.constexpr):
    """The sums of a chunk, constant behind its last row, and the sum of all."""
    b_all = tl.load(total + place + tl.minimum(BT, last - t) - 1)
    return tl.where(m_t, tl.load(total + place + o_t, mask=m_t, other=0.0), b_all), b_all


@triton.jit
def power(x):
    """`2^x` in float32."""
    return tl.exp2(x.to(tl.float32))


@triton.jit
def product(a, b, factor, more, PRECISION: tl.constexpr):
    """`factor more + a b`.

    Matrix units cut off what they add to instead of rounding it, always towards 0: with float32 inputs they are not
    given what they would add to.
    """
    if PRECISION == "tf32x3":
        return tl.fma(more, factor, tl.dot(a, b, input_precision=PRECISION))
    return tl.dot(a, b, more * factor, input_precision=PRECISION)


@triton.jit
def between(b_total, b_all, LATER: tl.constexpr):
    """What has been lost from the earlier to the later of each pair of rows, and something finite for the others."""
    b_gap = b_total[None, :] - b_total[:, None] if LATER else b_total[:, None] - b_total[None, :]
    return tl.exp2(tl.minimum(b_gap.to(tl.float32), tl.where(b_all > 0, float("inf"), 0.0)))


@triton.jit(do_not_specialize=UNSPECIALISED)
def prepare_kernel(
    dt, a, bias, step, total, chunks, low, high, H, rows,
    BT: tl.constexpr, BH: tl.constexpr, BIASED: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Step sizes, and sums of log decays, of one chunk and block of heads."""
    i_c, o_h, o_t = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BT)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    m_h, m = o_h < H, ((t + o_t) < last)[:, None] & (o_h < H)[None, :]
    b_step = tl.load(dt + t.to(tl.int64) * H + o_t[:, None] * H + o_h[None, :], mask=m, other=0.0).to(tl.float32)
    if BIASED:
        b_step += tl.load(bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        b_step = softplus(b_step)
    b_step = tl.minimum(tl.maximum(b_step, low), high)
    b_g = tl.maximum(b_step * tl.load(a + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :], LOG_ZERO)
    b_total = tl.cumsum(tl.where(m, b_g.to(total.dtype.element_ty) * LOG2E, 0.0), axis=0)
    place = o_h.to(tl.int64)[None, :] * rows + (t + o_t)[:, None]
    tl.store(step + place, b_step, mask=m)
    tl.store(total + place, b_total, mask=m)


@triton.jit(do_not_specialize=UNSPECIALISED)
def state_kernel(
    k, v, step, total, start, end, lost, states, entering, initial, kept, segments, H, R, rows,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    HAS_START: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_STATES: tl.constexpr, STORE_END: tl.constexpr,
    STORE_LOST: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks a segment of one head: forward for the states, in reverse with queries and dy for their gradients.

    In reverse it gives each chunk's product of the state that enters it, decayed by all of it, and dS. `entering` has
    these states in the dtype of v, and `initial` the first of each sequence as it was given.
    """
    i_s, i_h, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end_t, chunk = tl.load(segments + 4 * i_s), tl.load(segments + 4 * i_s + 1), tl.load(segments + 4 * i_s + 2)
    count = tl.cdiv(end_t - first, BT)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    m_k, m_v = o_k < K, o_v < V
    groups, own = H // R, (i_s.to(tl.int64) * H + i_h) * (K * V)
    o_s, m_s = o_k[:, None] * V + o_v[None, :], m_k[:, None] & m_v[None, :]
    o_x, o_y = o_t[:, None] * (groups * K) + o_k[None, :], o_t[:, None] * (H * V) + o_v[None, :]
    b_s, b_lost = tl.zeros([BK, BV], tl.float32), 0.0
    if HAS_START:
        b_s += tl.load(start + own + o_s, mask=m_s, other=0.0).to(tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        i_c = count - 1 - i if REVERSE else i
        t = first + i_c * BT
        m_t = (t + o_t) < end_t
        place_x, place_y = (t.to(tl.int64) * groups + i_h // R) * K, (t.to(tl.int64) * H + i_h) * V
        b_k = tl.load(k + place_x + o_x, mask=tile_mask(m_t, m_k, K), other=0.0)
        b_v = tl.load(v + place_y + o_y, mask=tile_mask(m_t, m_v, V), other=0.0)
        place = i_h.to(tl.int64) * rows + t
        b_total, b_all = decays(total, place, o_t, m_t, t, end_t, BT)
        if REVERSE:
            b_w = power(b_total)
        else:
            b_w = power(b_all - b_total) * tl.load(step + place + o_t, mask=m_t, other=0.0)
        b_lost += b_all.to(tl.float32)
        if STORE_STATES:
            place_s = ((chunk + i_c).to(tl.int64) * H + i_h) * (K * V)
            tl.store(states + place_s + o_s, b_s.to(states.dtype.element_ty), mask=m_s)
            if REVERSE:
                b_now = tl.load(entering + place_s + o_s, mask=m_s, other=0.0).to(tl.float32)
                if HAS_INITIAL:
                    if i_c == 0:
                        sequence = tl.load(segments + 4 * i_s + 3)
                        if sequence >= 0:
                            p_initial = initial + (sequence.to(tl.int64) * H + i_h) * (K * V) + o_s
                            b_now = tl.load(p_initial, mask=m_s, other=0.0).to(tl.float32)
                b_kept = tl.sum(tl.sum(b_now * b_s, axis=1), axis=0) * power(b_all)
                tl.store(kept + ((chunk + i_c) * H + i_h) * tl.num_programs(2) + i_v, b_kept)
        b_vw = (b_v.to(tl.float32) * b_w[:, None]).to(DOT)
        b_s = product(tl.trans(b_k).to(DOT), b_vw, power(b_all), b_s, PRECISION)
    if STORE_END:
        tl.store(end + own + o_s, b_s, mask=m_s)
    if STORE_LOST:
        o_lost = (i_s.to(tl.int64) * H + i_h) * K + o_k
        tl.store(lost + o_lost, tl.zeros([BK], tl.float32) + b_lost * LN2, mask=m_k)


@triton.jit(do_not_specialize=UNSPECIALISED)
def output_kernel(
    q, k, v, step, total, skip, states, out, chunks, H, R, rows,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HAS_SKIP: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and group."""
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
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_qk = tl.where(o_t[:, None] >= o_t[None, :], b_qk, 0.0)
    for i_r in tl.range(0, R, num_stages=STAGES):
        i_h = i_g * R + i_r
        place_y, place_s = (t.to(tl.int64) * H + i_h) * V, (i_c.to(tl.int64) * H + i_h) * (K * V)
        b_v = tl.load(v + place_y + o_y, mask=m_y, other=0.0)
        b_s = tl.load(states + place_s + o_s, mask=m_s, other=0.0).to(DOT)
        place = i_h.to(tl.int64) * rows + t
        b_w = tl.load(step + place + o_t, mask=m_t, other=0.0)
        b_total, b_all = decays(total, place, o_t, m_t, t, last, BT)
        b_o = tl.dot(b_q, b_s, input_precision=PRECISION) * power(b_total)[:, None]
        b_a = (b_qk * between(b_total, b_all, False) * b_w[None, :]).to(DOT)
        b_o = product(b_a, b_v.to(DOT), 1.0, b_o, PRECISION)
        if HAS_SKIP:
            b_o += tl.load(skip + i_h).to(tl.float32) * b_v.to(tl.float32)
        tl.store(out + place_y + o_y, b_o.to(out.dtype.element_ty), mask=m_y)
