"""Triton kernel of one decoding step of dilated attention: one stretch of what each pattern shows; softmax merges them.

A query that a pattern keeps sees the first slots of its own offset, up to its own place in the open segment: how many
they are follows from the number of tokens read, which lies on the device. The new key is taken from where it came from,
so that no program waits for the one that writes it.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.rotary_kernels import rotated
from farspan.ops.softmax.step_kernels import LOG2E, LOWEST, fold_lanes, leave_lanes


@triton.jit(do_not_specialize=["centre", "parts", "q_row", "k_row", "v_row"])
def live_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_bias, p_keys, p_values, p_slots, p_heads, p_seen, p_parts, p_stats, scale, centre,
    parts, q_row, k_row, v_row, H: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    BIAS: tl.constexpr, SEGMENTS: tl.constexpr, DILATIONS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One stretch of every pattern for one query head; `*_row` are the distances of batch rows.

    `p_slots` holds of each pattern the rows of its buffer and the slots of an offset, `p_heads` `[P, H, 2]` the offset
    of each head and its place among those that are kept.
    """
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, n = head // Q, tl.load(p_seen + row)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    p_cos, p_sin = p_cos + row * (R // 2), p_sin + row * (R // 2)
    b_q = rotated(p_q + row * q_row + head * K, o_k, m_k, p_cos, p_sin, R, False)
    b_q = b_q.to(p_q.dtype.element_ty).to(tl.float32) * (scale * LOG2E)
    b_new = rotated(p_k + row * k_row + group * K, o_k, m_k, p_cos, p_sin, R, False).to(p_keys[0].dtype.element_ty)
    b_value = tl.load(p_v + row * v_row + group * V + o_v, mask=m_v, other=0).to(p_values[0].dtype.element_ty)
    b_max = tl.zeros((BT,), tl.float32) + LOWEST
    b_sum, b_out = tl.zeros((BT,), tl.float32), tl.zeros((BT, BV), tl.float32)
    times = tl.zeros((), tl.float32)
    for i in tl.static_range(len(p_keys)):
        inside = (n % SEGMENTS[i]).to(tl.int32)
        offset = tl.load(p_heads + (i * H + head) * 2)
        taken = inside % DILATIONS[i] == offset
        first = tl.load(p_heads + (i * H + head) * 2 + 1) * tl.load(p_slots + i * 2 + 1)
        begin = (row * tl.load(p_slots + i * 2) + first) * (H // Q) + group
        keys, values = p_keys[i] + begin * K, p_values[i] + begin * V
        # A pattern that does not keep the place shows no slots: a branch around a loop upsets the compiler.
        old = inside // DILATIONS[i]
        here = taken & (part == 0)
        place = old.to(tl.int64) * (H // Q)
        tl.store(keys + place * K + o_k, b_new, mask=o_k < tl.where(here, K, 0))
        tl.store(values + place * V + o_v, b_value, mask=o_v < tl.where(here, V, 0))
        times += tl.where(here, 1.0, 0.0)
        old = tl.where(taken, old, 0)
        each = tl.cdiv(tl.cdiv(old, BT), parts) * BT
        stop = tl.minimum(old, part * each + each)
        for start in tl.range(part * each, stop, BT, num_stages=STAGES):
            slot = start + o_t
            seen = slot < stop
            at = slot.to(tl.int64)[:, None] * (H // Q)
            b_k = tl.load(keys + at * K + o_k[None, :], mask=seen[:, None] & m_k[None, :], other=0.0)
            b_v = tl.load(values + at * V + o_v[None, :], mask=seen[:, None] & m_v[None, :], other=0.0)
            b_s = tl.sum(b_k.to(tl.float32) * b_q[None, :], axis=1)
            if BIAS:
                ahead = slot * DILATIONS[i] + offset - inside
                line = p_bias + head.to(tl.int64) * (2 * centre + 1) + centre
                b_s += tl.load(line + ahead, mask=seen, other=0.0).to(tl.float32) * LOG2E
            b_max, b_sum, b_out = fold_lanes(b_s, seen, b_v, b_max, b_sum, b_out)
    b_s = tl.sum(b_new.to(tl.float32) * b_q, axis=0)
    if BIAS:
        b_s += tl.load(p_bias + head.to(tl.int64) * (2 * centre + 1) + centre).to(tl.float32) * LOG2E
    b_s = tl.where(times > 0, b_s, LOWEST)
    at = row * H + head
    leave_lanes(p_parts, p_stats, b_s, times, b_value, b_max, b_sum, b_out, at, part, parts, o_v, m_v, V)
