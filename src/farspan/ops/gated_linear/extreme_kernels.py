"""Triton kernels for chunks of extreme decays, which the factorisation about the centre of the chunk cannot hold.

Second halves of blocks of 64, 32, ..., 2 rows meet their first halves: rows i and j where i ^ j has its highest bit
in common with the length of a half. Queries of the second carry what was lost since the middle of their block, keys of
the first what is lost until it, so that all exponents are <= 0. One tile holds both, `x`: its product with itself has
the scores of all such pairs and, above the diagonal, their transpose, and that of `do v^T` with it has the gradients of
both. These kernels are launched over all chunks, many to a program, and leave moderate ones alone: their size never
burdens the common case. They hold BK channels at a time, others one after the other.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.gated_linear.kernels import (
    INTEGERS,
    is_extreme,
    kept_by_walk,
    key_and_decay,
    sigmoid,
    write_output,
)

MANY = tl.constexpr(16)


@triton.jit
def _any_extreme(half, first, count, i_h, H, K: tl.constexpr, BK: tl.constexpr, LIMIT: tl.constexpr):
    o_c, o_k = first + tl.arange(0, MANY), tl.arange(0, BK)
    largest = 0.0
    for i_k in range(tl.cdiv(K, BK)):
        offset = (o_c.to(tl.int64) * H + i_h)[:, None] * K + i_k * BK + o_k[None, :]
        b_half = tl.load(half + offset, mask=(o_c < count)[:, None] & (i_k * BK + o_k < K)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.max(b_half, axis=1), axis=0).to(tl.float32))
    return largest > LIMIT


@triton.jit
def _inputs(
    q, k, gate, row, o_t, o_k, m_t, scale, tau,
    H, K: tl.constexpr, DECAY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scaled queries, keys and log decays in float32."""
    mask = m_t[:, None] & (o_k < K)[None, :]
    b_q = tl.load(q + row * K + o_t[:, None] * (H * K) + o_k[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    _, b_k, b_g = key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, FAST)
    return b_q, b_k, b_g


@triton.jit
def _sum(chosen, x, FAST: tl.constexpr, PART: tl.constexpr):
    """Sums of the rows of x that each row has chosen."""
    total = tl.zeros(x.shape, tl.float32)
    # In a loop, the compiler does not see that products follow, for which every warp would hold whole rows.
    for _ in range(2 if FAST else 3):
        b_part = x.to(PART)
        total = tl.dot(chosen.to(PART), b_part, total)
        x -= b_part.to(tl.float32)
    return total


@triton.jit
def _to_middle(b_g, o_t, size, FAST: tl.constexpr, PART: tl.constexpr):
    """What is left on the way from or to the middle of a block of 2 * size rows, and which rows are behind it."""
    half, place = o_t // size, o_t % size
    second = (half % 2 == 1)[:, None]
    chosen = (half[:, None] == half[None, :]) & (second == (place[:, None] >= place[None, :]))
    return tl.exp(_sum(chosen, b_g, FAST, PART)), second


@triton.jit
def _meet(o_t, size):
    """Pairs of rows of different halves of a block of 2 * size rows."""
    half = o_t // size
    return (half[:, None] ^ half[None, :]) == 1


@triton.jit
def _scores(
    q, k, gate, row, o_t, m_t, count, scale, tau,
    H, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr,
    FAST: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The decayed scores of a chunk, on and below the diagonal, and their transpose above it."""
    b_a = tl.zeros([BT, BT], tl.float32)
    for i_k in tl.range(tl.cdiv(K, BK), disable_licm=True):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q, b_k, b_g = _inputs(q, k, gate, row, o_t, o_k, m_t, scale, tau, H, K, DECAY, FAST)
        b_a += tl.where(o_t[:, None] == o_t[None, :], tl.sum(b_q * b_k, axis=1)[:, None], 0.0)
        size = 1
        while size < count:
            b_left, second = _to_middle(b_g, o_t, size, FAST, PART)
            b_x = (tl.where(second, b_q, b_k) * b_left).to(DOT)
            b_a += tl.where(_meet(o_t, size), tl.dot(b_x, tl.trans(b_x), input_precision=PRECISION), 0.0)
            size *= 2
    return b_a


@triton.jit
def _over_values(
    p_x, m_x, p_y, m_y, count, V: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """`x y^T` of rows of V entries at these pointers."""
    b_xy = tl.zeros([m_x.shape[0], m_y.shape[0]], tl.float32)
    # Steps of a loop whose number is known are written out, see `_sum`; the last of these numbers is never taken.
    for i_v in range(tl.where(count > 0, tl.cdiv(V, BV), count)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_x = tl.load(p_x[:, None] + o_v[None, :], mask=m_x[:, None] & (o_v < V)[None, :], other=0.0).to(DOT)
        b_y = tl.load(p_y[None, :] + o_v[:, None], mask=m_y[None, :] & (o_v < V)[:, None], other=0.0).to(DOT)
        b_xy = tl.dot(b_x, b_y, b_xy, input_precision=PRECISION)
    return b_xy


@triton.jit
def _through_state(
    b_y, x, state, o_t, o_v, m_t, H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y + x S`."""
    part: tl.constexpr = BK if o_t.shape[0] > 32 else BK // 2  # halved chunks are those of float32, see `_over_values`
    for i_k in tl.range(tl.cdiv(K, part), disable_licm=True):
        o_k = i_k * part + tl.arange(0, part)
        p_x, m_x = x + o_t[:, None] * (H * K) + o_k[None, :], m_t[:, None] & (o_k < K)[None, :]
        p_s, m_s = state + o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]
        b_x, b_s = tl.load(p_x, mask=m_x, other=0.0).to(DOT), tl.load(p_s, mask=m_s, other=0.0).to(DOT)
        b_y = tl.dot(b_x, b_s, b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def _extreme_output(
    i_c, i_h, i_v, q, k, q_tilde, v, gate, u, states, out, rstd, chunks, scale, tau, eps,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, AUGMENT: tl.constexpr, INSIDE: tl.constexpr, NORMALIZE: tl.constexpr,
    FAST: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One extreme chunk of `extreme_output_kernel`."""
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    count = tl.minimum(last - t, BT)
    o_v, o_t = i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    own = (i_c.to(tl.int64) * H + i_h) * (K * V)
    m_t = o_t < count
    m_y = m_t[:, None] & (o_v < V)[None, :]
    b_a = _scores(
        q, k, gate, row, o_t, m_t, count, scale, tau, H, K, BT, BK, DECAY, FAST, PART, DOT, PRECISION
    )  # fmt: skip
    b_a = tl.where(o_t[:, None] >= o_t[None, :], b_a, 0.0).to(DOT)
    b_v = tl.load(v + row * V + o_t[:, None] * (H * V) + o_v[None, :], mask=m_y, other=0.0)
    b_o = tl.dot(b_a, b_v.to(DOT), input_precision=PRECISION)
    b_o = _through_state(b_o, q_tilde + row * K, states + own, o_t, o_v, m_t, H, K, V, BK, DOT, PRECISION)
    write_output(b_o, b_v, u, out, rstd, row, o_t, o_v, m_t, m_y, eps, H, V, AUGMENT, INSIDE, NORMALIZE, FAST)


@triton.jit(do_not_specialize=INTEGERS)
def extreme_output_kernel(
    q, k, q_tilde, v, gate, half, u, states, out, rstd, chunks, count, scale, tau, eps,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, AUGMENT: tl.constexpr, INSIDE: tl.constexpr,
    NORMALIZE: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `output_kernel`, for the extreme ones among `MANY` chunks."""
    i_h, i_v = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * MANY
    if _any_extreme(half, first, count, i_h, H, K, BK, LIMIT):
        for i in tl.range(tl.minimum(MANY, count - first), disable_licm=True):
            i_c = first + i
            if is_extreme(half, i_c.to(tl.int64) * H + i_h, K, BK, DECAY, LIMIT):
                _extreme_output(
                    i_c, i_h, i_v, q, k, q_tilde, v, gate, u, states, out, rstd, chunks, scale, tau, eps, H, K, V,
                    BT, BK, BV, DECAY, AUGMENT, INSIDE, NORMALIZE, FAST, PART, DOT, PRECISION,
                )  # fmt: skip


@triton.jit
def _of_decays(x, DECAY: tl.constexpr):
    """Sums over channels that decay together."""
    return tl.sum(x, axis=1)[:, None] if DECAY == 1 else x


@triton.jit
def _extreme_gradient(
    i_c, i_h, q, k, k_tilde, v, gate, u, weight, d_out, states, d_states, dq, dk, dv, d_gate, du, d_weight, kept,
    chunks, scale, tau,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, AUGMENT: tl.constexpr, KEPT: tl.constexpr, BLOCKS: tl.constexpr,
    INSIDE: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One extreme chunk of `extreme_gradient_kernel`."""
    place = i_c.to(tl.int64) * H + i_h
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    count = tl.minimum(last - t, BT)
    o_t = tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    own = place * (K * V)
    m_t = o_t < count
    earlier, later = o_t[:, None] >= o_t[None, :], o_t[:, None] <= o_t[None, :]
    b_at = _scores(
        q, k, gate, row, o_t, m_t, count, scale, tau, H, K, BT, BK, DECAY, FAST, PART, DOT, PRECISION
    )  # fmt: skip
    b_at = tl.where(later, b_at, 0.0).to(DOT)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_y = m_t[:, None] & (o_v < V)[None, :]
        o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
        b_v, b_do = tl.load(v + o_y, mask=m_y, other=0.0), tl.load(d_out + o_y, mask=m_y, other=0.0)
        b_dv = tl.dot(b_at, b_do.to(DOT), input_precision=PRECISION)
        b_dv = _through_state(b_dv, k_tilde + row * K, d_states + own, o_t, o_v, m_t, H, K, V, BK, DOT, PRECISION)
        if AUGMENT:
            b_u = tl.load(u + row + o_t * H, mask=m_t, other=0.0)[:, None]
            b_r = sigmoid(b_u * b_v.to(tl.float32) if INSIDE else b_u, FAST)
            b_dv += b_do.to(tl.float32) * (b_u * (b_r - b_r * b_r) if INSIDE else b_r)
        tl.store(dv + o_y, b_dv.to(dv.dtype.element_ty), mask=m_y)
    p_v, p_do = v + row * V + o_t * (H * V), d_out + row * V + o_t * (H * V)
    b_da = _over_values(p_do, m_t, p_v, m_t, count, V, BV, DOT, PRECISION)
    b_dat = _over_values(p_v, m_t, p_do, m_t, count, V, BV, DOT, PRECISION)
    b_same = tl.sum(tl.where(earlier & later, b_da, 0.0), axis=1)[:, None]
    b_da = tl.where(later, b_dat, b_da).to(DOT)
    b_sum, end = tl.zeros([BT], tl.float32), 0.0
    for i_k in tl.range(tl.cdiv(K, BK), disable_licm=True):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        p_s, p_ds = states + own + o_k * V, d_states + own + o_k * V
        b_dq = _over_values(p_do, m_t, p_s, m_k, count, V, BV, DOT, PRECISION)
        b_dk = _over_values(p_v, m_t, p_ds, m_k, count, V, BV, DOT, PRECISION)
        b_kept = tl.zeros([BK], tl.float32)
        if KEPT:
            b_kept += kept_by_walk(kept, place, o_k, K, BLOCKS)
        else:
            for i_v in range(tl.cdiv(V, BV)):
                o_v = i_v * BV + tl.arange(0, BV)
                m_s = m_k[:, None] & (o_v < V)[None, :]
                b_s = tl.load(p_s[:, None] + o_v[None, :], mask=m_s, other=0.0).to(tl.float32)
                b_ds = tl.load(p_ds[:, None] + o_v[None, :], mask=m_s, other=0.0).to(tl.float32)
                b_kept += tl.sum(b_s * b_ds, axis=1)
        b_q, b_k, b_g = _inputs(q, k, gate, row, o_t, o_k, m_t, scale, tau, H, K, DECAY, FAST)
        if AUGMENT:
            b_du = tl.load(du + row + o_t * H, mask=m_t, other=0.0)[:, None] / scale
            tl.store(d_weight + place * K + o_k, tl.sum(b_du * b_q * b_k, axis=0), mask=m_k)
        b_dq *= tl.exp(_sum(earlier, b_g, FAST, PART))
        b_dk *= tl.exp(_sum(~earlier, b_g, FAST, PART))
        b_at_end = b_kept * tl.exp(tl.sum(b_g, axis=0)) + tl.sum(b_k * b_dk, axis=0)
        b_net = _of_decays(b_q * b_dq - b_k * b_dk, DECAY)
        # What a row's own query and key give each other leaves the decays alone.
        b_own = b_same
        if AUGMENT:
            b_w = tl.load(weight + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
            b_own += b_du * b_w
        b_dq += b_own * b_k
        b_dk += b_own * b_q
        size = 1
        while size < count:
            b_left, second = _to_middle(b_g, o_t, size, FAST, PART)
            b_x = (tl.where(second, b_q, b_k) * b_left).to(DOT)
            b_part = tl.where(_meet(o_t, size), b_da, 0.0)
            b_dx = tl.dot(b_part, b_x, input_precision=PRECISION)
            # Both rows of a pair take the rounded x, so that nothing is left of pairs that a decay does not part.
            b_net += _of_decays(tl.where(second, b_dx, -b_dx) * b_x.to(tl.float32), DECAY)
            b_dx *= b_left
            b_dq += tl.where(second, b_dx, 0.0)
            b_dk += tl.where(second, 0.0, b_dx)
            size *= 2
        mask = m_t[:, None] & m_k[None, :]
        o_x = row * K + o_t[:, None] * (H * K) + o_k[None, :]
        tl.store(dq + o_x, (b_dq * scale).to(dq.dtype.element_ty), mask=mask)
        if DECAY != 3:
            tl.store(dk + o_x, b_dk.to(dk.dtype.element_ty), mask=mask)
        if DECAY == 1:
            b_sum += tl.sum(b_net, axis=1)
            end += tl.sum(b_at_end, axis=0)
        else:
            b_dg = _sum(later, b_net, FAST, PART) + b_at_end[None, :]
            if DECAY == 3:
                b_z = tl.load(gate + o_x, mask=mask, other=0.0).to(tl.float32)
                b_dg = (b_dg - (1 - b_k) * b_dk) * sigmoid(-b_z, FAST) * (1 / tau)
            tl.store(d_gate + o_x, b_dg.to(d_gate.dtype.element_ty), mask=mask)
    if DECAY == 1:
        b_sum = tl.cumsum(b_sum, axis=0, reverse=True) + end
        tl.store(d_gate + row + o_t * H, b_sum.to(d_gate.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=INTEGERS)
def extreme_gradient_kernel(
    q, k, k_tilde, v, gate, half, u, weight, d_out, states, d_states, dq, dk, dv, d_gate, du, d_weight, kept,
    chunks, count, scale, tau,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, AUGMENT: tl.constexpr, KEPT: tl.constexpr,
    BLOCKS: tl.constexpr, INSIDE: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients, for the extreme ones among `MANY` chunks."""
    i_h = tl.program_id(1)
    first = tl.program_id(0) * MANY
    if _any_extreme(half, first, count, i_h, H, K, BK, LIMIT):
        for i in tl.range(tl.minimum(MANY, count - first), disable_licm=True):
            i_c = first + i
            if is_extreme(half, i_c.to(tl.int64) * H + i_h, K, BK, DECAY, LIMIT):
                _extreme_gradient(
                    i_c, i_h, q, k, k_tilde, v, gate, u, weight, d_out, states, d_states, dq, dk, dv, d_gate, du,
                    d_weight, kept, chunks, scale, tau, H, K, V, BT, BK, BV, DECAY, AUGMENT, KEPT, BLOCKS,
                    INSIDE, FAST, PART, DOT, PRECISION,
                )  # fmt: skip
