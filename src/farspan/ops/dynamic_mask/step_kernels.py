"""Triton kernels of one decoding step of dynamic mask attention: who dies and where the new key goes, then attention.

One program per key head decides, for all of its bias heads, and writes. The slots are then read in stretches side by
side, which softmax attention's decoding step merges.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.rotary_kernels import rotated
from farspan.ops.softmax.step_kernels import fold, leave, stretch

LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)
GONE = tl.constexpr(float("-inf"))


@triton.jit
def _worth(ranking, born):
    """Ranking and, of equals, age as one whole number: the least is the worst; NONE where a slot is free."""
    bits = tl.where(ranking == 0.0, 0.0, ranking).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    worth = (bits.to(tl.int64) << 32) + born.to(tl.int64)
    return tl.where(ranking == GONE, NONE, worth)


@triton.jit
def _turned(p, o, m, p_norm, p_cos, p_sin, eps, axis: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
            NORMED: tl.constexpr):  # fmt: skip
    """Queries or keys, normed and rotated, float32."""
    b = tl.load(p + o, mask=m, other=0).to(tl.float32)
    b_times = tl.rsqrt(tl.sum(b * b, axis=axis, keep_dims=True) / K + eps)
    return rotated(p, o, m, p_cos, p_sin, R, False, p_norm, b_times, NORMED)


@triton.jit(do_not_specialize=["S", "keep", "k_row", "v_row"])
def take_in_kernel(
    p_k, p_v, p_bias, p_ranking, p_cos, p_sin, p_norm, p_keys, p_values, p_biases, p_rankings, p_born, p_seen, eps, S,
    keep, k_row, v_row, G: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    NORMED: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Lets the worst of every crowded bias head die, and writes the new key into a free slot if it lives for any."""
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    age = tl.load(p_seen + row)
    o_r, o_s, o_k, o_v = tl.arange(0, BR), tl.arange(0, BS), tl.arange(0, BK), tl.arange(0, BV)
    m_r = o_r < SHARED
    p_rankings += (row * S * G + group) * SHARED
    p_born += row * S * G + group
    new = (row * G + group) * SHARED + o_r
    b_ranking = tl.load(p_ranking + new, mask=m_r, other=GONE)
    worth = _worth(b_ranking, age + tl.zeros((BR,), tl.int32))
    count = (b_ranking > GONE).to(tl.int32)
    worst, where, free = worth, tl.full((BR,), 0, tl.int32), S
    for start in range(0, S, BS):
        slot = start + o_s
        inside = slot < S
        place = slot.to(tl.int64) * G
        held = tl.load(
            p_rankings + place[None, :] * SHARED + o_r[:, None], mask=m_r[:, None] & inside[None, :], other=GONE
        )
        born = tl.load(p_born + place, mask=inside, other=0)
        lives = held > GONE
        count += tl.sum(lives.to(tl.int32), 1)
        each = _worth(held, tl.broadcast_to(born[None, :], (BR, BS)))
        least = tl.min(each, 1)
        found = tl.min(tl.where(lives & (each == least[:, None]), slot[None, :], S), 1)
        where = tl.where(least < worst, found, where)
        worst = tl.minimum(worst, least)
        free = tl.minimum(free, tl.min(tl.where(inside & (tl.max(lives.to(tl.int32), 0) == 0), slot, S), 0))
    crowded = count > keep
    lives = (b_ranking > GONE) & ((count <= keep) | (worst != worth))
    dies = crowded & (worst != worth)
    # The slot of a dead key is free if no other bias head holds it.
    p_worst = p_rankings + where.to(tl.int64) * G * SHARED
    others = tl.load(p_worst[:, None] + o_r[None, :], mask=dies[:, None] & m_r[None, :], other=GONE)
    held = (others > GONE) & ~(dies[None, :] & (where[None, :] == where[:, None]))
    free = tl.minimum(free, tl.min(tl.where(dies & (tl.max(held.to(tl.int32), 1) == 0), where, S), 0))
    tl.debug_barrier()  # everything has been looked at
    tl.store(p_worst + o_r, GONE, mask=dies)
    tl.debug_barrier()  # the slot of the dead may be the one that is written
    stays = tl.where(free < S, tl.max(lives.to(tl.int32), 0), 0)
    slot = (row * S + free) * G + group
    mine = free.to(tl.int64) * G
    m_new = m_r & (o_r * 0 + stays > 0)  # as a block: the interpreter makes no mask of a single truth
    tl.store(p_rankings + mine * SHARED + o_r, tl.where(lives, b_ranking, GONE), mask=m_new)
    tl.store(p_biases + slot * SHARED + o_r, tl.load(p_bias + new, mask=m_new, other=0.0), mask=m_new)
    tl.store(p_born + mine, age, mask=stays > 0)
    p_cos += row * (R // 2)
    p_sin += row * (R // 2)
    b_k = _turned(p_k + row * k_row + group * K, o_k, o_k < K, p_norm, p_cos, p_sin, eps, 0, K, R, NORMED)
    tl.store(p_keys + slot * K + o_k, b_k.to(p_keys.dtype.element_ty), mask=(o_k < K) & (o_k * 0 + stays > 0))
    b_v = tl.load(p_v + row * v_row + group * V + o_v, mask=o_v < V, other=0.0)
    tl.store(p_values + slot * V + o_v, b_v.to(p_values.dtype.element_ty), mask=(o_v < V) & (o_v * 0 + stays > 0))


@triton.jit(do_not_specialize=["S", "parts", "q_row"])
def live_kernel(
    p_q, p_cos, p_sin, p_norm, p_keys, p_values, p_biases, p_rankings, p_parts, p_stats, scale, eps, S, parts, q_row,
    G: tl.constexpr, SHARED: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    NORMED: tl.constexpr, QB: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch of the slots for the Q query heads of one bias head."""
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // SHARED
    first, stop = stretch(S, S, part, parts, BT)
    o_q, o_k, o_v, o_t = tl.arange(0, QB), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    m_q, m_k, m_v = o_q < Q, o_k < K, o_v < V
    nothing = tl.zeros((QB, 1), tl.int32)
    p_cos, p_sin = p_cos + row * (R // 2) + nothing, p_sin + row * (R // 2) + nothing
    p_q += row * q_row + (head * Q + o_q[:, None]) * K
    m_both = m_q[:, None] & m_k[None, :]
    b_q = _turned(p_q, o_k[None, :], m_both, p_norm + nothing, p_cos, p_sin, eps, 1, K, R, NORMED)
    b_q = b_q.to(p_q.dtype.element_ty).to(DOT)
    # A first key without weight or value: a row that sees no other gives 0.
    b_max = tl.zeros((QB,), tl.float32) + LOWEST
    b_sum, b_out = tl.zeros((QB,), tl.float32), tl.zeros((QB, BV), tl.float32)
    b_sum += (part == 0).to(tl.float32)
    for start in range(first, stop, BT):
        inside = start + o_t < stop
        place = (row * S + start + o_t) * G + group
        member = place * SHARED + head % SHARED
        ranking = tl.load(p_rankings + member, mask=inside, other=GONE)
        bias = tl.load(p_biases + member, mask=inside, other=0.0)
        seen = ranking > GONE
        b_k = tl.load(p_keys + place[None, :] * K + o_k[:, None], mask=seen[None, :] & m_k[:, None], other=0.0)
        b_v = tl.load(p_values + place[:, None] * V + o_v[None, :], mask=seen[:, None] & m_v[None, :], other=0.0)
        b_s = (tl.dot(b_q, b_k.to(DOT), input_precision=PRECISION) * scale + bias[None, :]) * LOG2E
        b_max, b_sum, b_out = fold(b_s, seen, b_v, b_max, b_sum, b_out, DOT, PRECISION)
    o_head = (row * G * SHARED + head) * Q + o_q
    leave(p_parts, p_stats, b_max, b_sum, b_out, o_head, m_q, part, parts, o_v, m_v, V)
