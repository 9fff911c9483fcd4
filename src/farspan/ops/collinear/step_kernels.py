"""Triton kernel of one decoding step of collinear attention: one stretch of the coefficients; softmax merges them.

A score is Σ_j t_j (A_j cos(p θ_j) + B_j sin(p θ_j)) at the position p of a key. With p = p₀ + i in a block that starts
at p₀, A and B are turned by p₀ θ once for the block, and t is multiplied with the sines and cosines of i θ, which every
block shares: the angles take no memory and next to no time. A query head with keys of its own is served by lanes, one a
slot, which multiply no matrices: of 16 rows only one would be filled.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.softmax.step_kernels import (
    LOG2E,
    LOWEST,
    fold,
    fold_lanes,
    leave,
    leave_lanes,
    stretch,
    write,
)

TURN = tl.constexpr(6.283185307179586)


@triton.jit
def _turn(position, b_theta, turns, rotary_scale):
    """cos and sin of an angle, 1 and 0 for what is not rotated; whole turns go before it is rounded to float32."""
    b_angle = position.to(tl.float64) * b_theta.to(tl.float64)
    b_angle = (b_angle - tl.floor(b_angle * (1 / TURN)) * TURN).to(tl.float32)
    return tl.where(turns, tl.cos(b_angle) * rotary_scale, 1.0), tl.where(turns, tl.sin(b_angle) * rotary_scale, 0.0)


@triton.jit
def _turned(b_a, b_b, b_cos, b_sin):
    """The weights of cos and sin once angles begin later."""
    return b_a * b_cos + b_b * b_sin, b_b * b_cos - b_a * b_sin


@triton.jit
def _slots(age, stop, oldest, S, p_mask, MASKED: tl.constexpr):
    """Where the keys of these ages lie, 0 being the oldest that is seen, and which of them are read."""
    slot = oldest % S + age
    slot = tl.where(slot >= S, slot - S, slot)
    seen = age < stop
    if MASKED:
        seen = seen & (tl.load(p_mask + slot, mask=seen, other=0) != 0)
    return slot, seen


@triton.jit
def _pair(o_j, K: tl.constexpr, R: tl.constexpr):
    """The two channels that share coefficient j."""
    one = tl.where(o_j < R // 2, o_j, o_j + R // 2)
    return one, one + tl.where(o_j < R // 2, R // 2, K // 2 - R // 2)


@triton.jit
def _weights(p_one, p_other, m, b_cos, b_sin, scale, STRICT: tl.constexpr):
    """A and B, to the base 2, of queries at a place with these cosines and sines."""
    b_x, b_y = tl.load(p_one, mask=m, other=0).to(tl.float32), tl.load(p_other, mask=m, other=0).to(tl.float32)
    if STRICT:
        b_n = (b_x * b_x + b_y * b_y) * scale
        b_a, b_b = b_n * b_cos, b_n * b_sin
    else:
        b_x, b_y = b_x * (b_x * b_cos - b_y * b_sin) * scale, b_y * (b_y * b_cos + b_x * b_sin) * scale
        b_a, b_b = b_x + b_y, b_y - b_x
    return b_a * LOG2E, b_b * LOG2E


@triton.jit
def _split(b_x, rounded, DOT: tl.constexpr):
    """The rounded numbers in some rows, what rounding cuts in the others."""
    b_near = b_x.to(DOT).to(tl.float32)
    return tl.where(rounded[:, None], b_near, b_x - b_near).to(DOT)


@triton.jit(do_not_specialize=["S", "parts", "q_row", "t_row", "v_row"])
def collinear_kernel(
    p_q, p_t, p_v, p_positions, p_theta, p_keys, p_values, p_mask, p_filled, p_parts, p_stats, scale, rotary_scale,
    S, parts, q_row, t_row, v_row, G: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    R: tl.constexpr, STRICT: tl.constexpr, MASKED: tl.constexpr, QB: tl.constexpr, BT: tl.constexpr,
    BJ: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch for the Q query heads of one key head; `*_row` are the distances of batch rows.

    Rows of the first half of QB multiply the rounded weights, those of the second what rounding has cut from them.
    """
    group, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.load(p_filled + row)
    place = n % S
    now = tl.load(p_positions + row).to(tl.int32)
    old = tl.minimum(n, S - 1)
    first, stop = stretch(old, S, part, parts, BT)
    o_q, o_j, o_v, o_t = tl.arange(0, QB) % (QB // 2), tl.arange(0, BJ), tl.arange(0, BV), tl.arange(0, BT)
    m_q, m_j, m_v, turns = o_q < Q, o_j < K // 2, o_v < V, o_j < R // 2
    rounded = tl.arange(0, QB) < QB // 2
    b_theta = tl.load(p_theta + o_j, mask=turns, other=0.0)
    one, other = _pair(o_j, K, R)
    p_q += row * q_row + (group * Q + o_q[:, None]) * K
    b_cos, b_sin = _turn(now, b_theta, turns, rotary_scale)
    b_cos, b_sin = b_cos[None, :], b_sin[None, :]
    m_qj = m_q[:, None] & m_j[None, :]
    b_a, b_b = _weights(p_q + one[None, :], p_q + other[None, :], m_qj, b_cos, b_sin, scale, STRICT)
    p_keys += (row * S * G + group) * (K // 2)
    p_values += (row * S * G + group) * V
    p_mask += row * S
    b_max = tl.zeros((QB,), tl.float32) + LOWEST
    b_sum, b_out = tl.zeros((QB,), tl.float32), tl.zeros((QB, BV), tl.float32)
    if part == 0:
        new = place.to(tl.int64) * G
        b_t = write(p_keys + new * (K // 2), p_t + row * t_row + group * (K // 2), p_mask, place, o_j, m_j, False)
        b_v = write(p_values + new * V, p_v + row * v_row + group * V, p_mask, place, o_v, m_v, MASKED)
        b_max = tl.sum(b_t[None, :] * (b_a * b_cos + b_b * b_sin), axis=1)
        b_sum += 1.0
        b_out += b_v[None, :]
    b_cos, b_sin = _turn(now - old + first, b_theta, turns, rotary_scale)
    b_a, b_b = _turned(b_a, b_b, b_cos[None, :], b_sin[None, :])
    b_angle = o_t.to(tl.float32)[None, :] * b_theta[:, None]
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)
    # From one block to the next.
    b_c, b_d = tl.cos(BT * b_theta)[None, :], tl.sin(BT * b_theta)[None, :]
    for start in range(first, stop, BT):
        at, seen = _slots(start + o_t, stop, n - old, S, p_mask, MASKED)
        at = at.to(tl.int64) * G
        m_t = seen[None, :] & m_j[:, None]
        b_t = tl.load(p_keys + at[None, :] * (K // 2) + o_j[:, None], mask=m_t, other=0.0)
        b_v = tl.load(p_values + at[:, None] * V + o_v[None, :], mask=seen[:, None] & m_v[None, :], other=0.0)
        b_t = b_t.to(tl.float32)
        b_scores = tl.dot(_split(b_a, rounded, DOT), (b_t * b_cos).to(DOT), input_precision=PRECISION)
        b_scores = tl.dot(_split(b_b, rounded, DOT), (b_t * b_sin).to(DOT), b_scores, input_precision=PRECISION)
        b_scores = tl.sum(tl.reshape(b_scores, (2, QB // 2, BT)), axis=0, keep_dims=True)
        b_scores = tl.reshape(tl.broadcast_to(b_scores, (2, QB // 2, BT)), (QB, BT))
        b_a, b_b = _turned(b_a, b_b, b_c, b_d)
        b_max, b_sum, b_out = fold(b_scores, seen, b_v, b_max, b_sum, b_out, DOT, PRECISION)
    head = row * G * Q + group * Q + o_q
    leave(p_parts, p_stats, b_max, b_sum, b_out, head, m_q & rounded, part, parts, o_v, m_v, V)


@triton.jit(do_not_specialize=["S", "parts", "q_row", "t_row", "v_row"])
def collinear_lanes_kernel(
    p_q, p_t, p_v, p_positions, p_theta, p_keys, p_values, p_mask, p_filled, p_parts, p_stats, scale, rotary_scale,
    S, parts, q_row, t_row, v_row, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    STRICT: tl.constexpr, MASKED: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One stretch for the one query head of a key head."""
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.load(p_filled + row)
    place = n % S
    now = tl.load(p_positions + row).to(tl.int32)
    old = tl.minimum(n, S - 1)
    first, stop = stretch(old, S, part, parts, BT)
    o_j, o_v, o_t = tl.arange(0, BJ), tl.arange(0, BV), tl.arange(0, BT)
    m_j, m_v, turns = o_j < K // 2, o_v < V, o_j < R // 2
    b_theta = tl.load(p_theta + o_j, mask=turns, other=0.0)
    one, other = _pair(o_j, K, R)
    p_q += row * q_row + head * K
    b_cos, b_sin = _turn(now, b_theta, turns, rotary_scale)
    b_a, b_b = _weights(p_q + one, p_q + other, m_j, b_cos, b_sin, scale, STRICT)
    p_keys += (row * S * G + head) * (K // 2)
    p_values += (row * S * G + head) * V
    p_mask += row * S
    b_own, times = tl.full((), LOWEST, tl.float32), tl.zeros((), tl.float32)
    b_value = tl.zeros((BV,), tl.float32)
    if part == 0:
        new = place.to(tl.int64) * G
        b_t = write(p_keys + new * (K // 2), p_t + row * t_row + head * (K // 2), p_mask, place, o_j, m_j, False)
        b_value = write(p_values + new * V, p_v + row * v_row + head * V, p_mask, place, o_v, m_v, MASKED)
        b_own = tl.sum(b_t * (b_a * b_cos + b_b * b_sin), axis=0)
        times += 1.0
    b_cos, b_sin = _turn(now - old + first, b_theta, turns, rotary_scale)
    b_a, b_b = _turned(b_a, b_b, b_cos, b_sin)
    b_angle = o_t.to(tl.float32)[:, None] * b_theta[None, :]
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)
    # From one block to the next.
    b_c, b_d = tl.cos(BT * b_theta), tl.sin(BT * b_theta)
    b_max = tl.zeros((BT,), tl.float32) + LOWEST
    b_sum, b_out = tl.zeros((BT,), tl.float32), tl.zeros((BT, BV), tl.float32)
    for start in tl.range(first, stop, BT, num_stages=STAGES):
        at, seen = _slots(start + o_t, stop, n - old, S, p_mask, MASKED)
        at = at.to(tl.int64)[:, None] * G
        b_t = tl.load(p_keys + at * (K // 2) + o_j[None, :], mask=seen[:, None] & m_j[None, :], other=0.0)
        b_v = tl.load(p_values + at * V + o_v[None, :], mask=seen[:, None] & m_v[None, :], other=0.0)
        b_s = tl.sum(b_t.to(tl.float32) * (b_a[None, :] * b_cos + b_b[None, :] * b_sin), axis=1)
        b_a, b_b = _turned(b_a, b_b, b_c, b_d)
        b_max, b_sum, b_out = fold_lanes(b_s, seen, b_v, b_max, b_sum, b_out)
    head += row * G
    leave_lanes(p_parts, p_stats, b_own, times, b_value, b_max, b_sum, b_out, head, part, parts, o_v, m_v, V)
