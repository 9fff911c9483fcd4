"""Triton kernels of one decoding step of softmax attention: stretches of the filled slots side by side, then merged.

The number of stretches is fixed; what each of them reads follows from the number of filled slots, which lies on the
device, so that a captured graph of the step stays right while the memory fills. Merging goes in the order of the
stretches: repeated runs agree bit for bit.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.rotary_kernels import rotated

LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def stretch(n, S, part, parts, BT: tl.constexpr):
    """First and last slot, exclusive, of one of so many stretches of the slots that are filled before this step."""
    end = tl.minimum(n, S)
    each = tl.cdiv(tl.cdiv(end, BT), parts) * BT
    return part * each, tl.minimum(end, part * each + each)


@triton.jit
def visible(slot, stop, place, p_mask, MASKED: tl.constexpr):
    """Which slots are read: all but the one that is written over, and with a mask only real ones."""
    seen = (slot < stop) & (slot != place)
    if MASKED:
        seen = seen & (tl.load(p_mask + slot, mask=seen, other=0) != 0)
    return seen


@triton.jit
def fold(b_s, seen, b_v, b_max, b_sum, b_out, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Takes a block of scores `[QB, BT]` (base 2) and values `[BT, BV]` into a running softmax."""
    b_s = tl.where(seen[None, :], b_s, LOWEST)
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_p = tl.where(seen[None, :], tl.exp2(b_s - b_new[:, None]), 0.0)
    b_keep = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_keep + tl.sum(b_p, axis=1)
    b_out = b_out * b_keep[:, None] + tl.dot(b_p.to(DOT), b_v.to(DOT), input_precision=PRECISION)
    return b_new, b_sum, b_out


@triton.jit
def write(p_values, p_v, p_mask, place, o_v, m_v, MASKED: tl.constexpr):
    """Puts the new value (and that it is real) into its slot, and returns it as the slot will give it back."""
    b_v = tl.load(p_v + o_v, mask=m_v, other=0).to(p_values.dtype.element_ty)
    tl.store(p_values + o_v, b_v, mask=m_v)
    if MASKED:
        tl.store(p_mask + place, 1)
    return b_v.to(tl.float32)


@triton.jit
def leave(p_parts, p_stats, b_max, b_sum, b_out, head, m_head, part, parts, o_v, m_v, V: tl.constexpr):
    """Stores the softmax of one stretch: its sums, and the largest score and the total that they belong to."""
    o_part = head * parts + part
    tl.store(p_parts + o_part[:, None] * V + o_v[None, :], b_out, mask=m_head[:, None] & m_v[None, :])
    tl.store(p_stats + o_part * 2, b_max, mask=m_head)
    tl.store(p_stats + o_part * 2 + 1, b_sum, mask=m_head)


@triton.jit
def fold_lanes(b_s, seen, b_v, b_max, b_sum, b_out):
    """As `fold` for one query: scores `[BT]`, each lane with a running softmax of its own, so that none waits."""
    b_s = tl.where(seen, b_s, LOWEST)
    b_new = tl.maximum(b_max, b_s)
    b_p = tl.where(seen, tl.exp2(b_s - b_new), 0.0)
    b_keep = tl.exp2(b_max - b_new)
    return b_new, b_sum * b_keep + b_p, b_out * b_keep[:, None] + b_p[:, None] * b_v.to(tl.float32)


@triton.jit
def leave_lanes(p_parts, p_stats, b_s, times, b_v, b_max, b_sum, b_out, head, part, parts, o_v, m_v, V: tl.constexpr):
    """As `leave` for the lanes of one query, and a value `[BV]` with a score of its own that counts so many times."""
    b_top = tl.maximum(tl.max(b_max, axis=0, keep_dims=True), b_s)
    b_w, b_own = tl.exp2(b_max - b_top), times * tl.exp2(b_s - b_top)
    b_total = tl.sum(b_w * b_sum, axis=0, keep_dims=True) + b_own
    b_o = tl.sum(b_w[:, None] * b_out, axis=0, keep_dims=True) + b_own[:, None] * b_v.to(tl.float32)[None, :]
    one = tl.zeros((1,), tl.int32)
    leave(p_parts, p_stats, b_top, b_total, b_o, one + head, one == 0, part, parts, o_v, m_v, V)


@triton.jit(do_not_specialize=["S", "parts", "q_row", "k_row", "v_row"])
def attend_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_keys, p_values, p_mask, p_filled, p_parts, p_stats, scale, S, parts,
    q_row, k_row, v_row, G: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, QB: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch for the Q query heads of one key head; `*_row` are the distances of batch rows."""
    group, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.load(p_filled + row)
    place = n % S
    first, stop = stretch(n, S, part, parts, BT)
    o_q, o_k, o_v, o_t = tl.arange(0, QB), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    m_q, m_k, m_v = o_q < Q, o_k < K, o_v < V
    p_q += row * q_row + (group * Q + o_q[:, None]) * K
    nothing = tl.zeros((QB, 1), tl.int32)
    p_cos, p_sin = p_cos + row * (R // 2) + nothing, p_sin + row * (R // 2) + nothing
    b_q = rotated(p_q, o_k[None, :], m_q[:, None] & m_k[None, :], p_cos, p_sin, R, INTERLEAVED)
    b_q = b_q.to(p_q.dtype.element_ty).to(tl.float32)
    p_keys += (row * S * G + group) * K
    p_values += (row * S * G + group) * V
    p_mask += row * S
    b_max = tl.zeros((QB,), tl.float32) + LOWEST
    b_sum, b_out = tl.zeros((QB,), tl.float32), tl.zeros((QB, BV), tl.float32)
    scale *= LOG2E
    if part == 0:
        new = place.to(tl.int64) * G
        p_new = p_k + row * k_row + group * K + nothing
        b_k = rotated(p_new, o_k[None, :], m_k[None, :] & (nothing == 0), p_cos, p_sin, R, INTERLEAVED)
        b_k = b_k.to(p_keys.dtype.element_ty)
        tl.store(p_keys + new * K + nothing + o_k[None, :], b_k, mask=m_k[None, :] & (o_q == 0)[:, None])
        b_v = write(p_values + new * V, p_v + row * v_row + group * V, p_mask, place, o_v, m_v, MASKED)
        b_max = tl.sum(b_q * b_k.to(tl.float32), axis=1) * scale
        b_sum += 1.0
        b_out += b_v[None, :]
    b_q = b_q.to(DOT)
    for start in range(first, stop, BT):
        seen = visible(start + o_t, stop, place, p_mask, MASKED)
        at = (tl.zeros((), tl.int64) + start) * G
        o_s = o_t * G
        b_k = tl.load(p_keys + at * K + o_s[None, :] * K + o_k[:, None], mask=seen[None, :] & m_k[:, None], other=0.0)
        b_v = tl.load(p_values + at * V + o_s[:, None] * V + o_v[None, :], mask=seen[:, None] & m_v[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k.to(DOT), input_precision=PRECISION) * scale
        b_max, b_sum, b_out = fold(b_s, seen, b_v, b_max, b_sum, b_out, DOT, PRECISION)
    head = row * G * Q + group * Q + o_q
    leave(p_parts, p_stats, b_max, b_sum, b_out, head, m_q, part, parts, o_v, m_v, V)


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(
    p_parts, p_stats, p_filled, p_out, parts, H: tl.constexpr, V: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr
):
    """One head of one row from its stretches; the first head counts the new token."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_s, o_v = tl.arange(0, BS), tl.arange(0, BV)
    at, m_v = (row * H + head) * parts, o_v < V
    b_top = tl.full((), LOWEST, tl.float32)
    for start in range(0, parts, BS):
        b_max = tl.load(p_stats + (at + start + o_s) * 2, mask=start + o_s < parts, other=LOWEST)
        b_top = tl.maximum(b_top, tl.max(b_max, axis=0))
    b_sum, b_out = tl.zeros((), tl.float32), tl.zeros((BV,), tl.float32)
    for start in range(0, parts, BS):
        here = start + o_s < parts
        o_part = at + start + o_s
        b_w = tl.exp2(tl.load(p_stats + o_part * 2, mask=here, other=LOWEST) - b_top)
        b_sum += tl.sum(b_w * tl.load(p_stats + o_part * 2 + 1, mask=here, other=0.0), axis=0)
        b_o = tl.load(p_parts + o_part[:, None] * V + o_v[None, :], mask=here[:, None] & m_v[None, :], other=0.0)
        b_out += tl.sum(b_w[:, None] * b_o, axis=0)
    # A query that sees nothing gives 0.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(p_out + (row * H + head) * V + o_v, (b_out / b_sum).to(p_out.dtype.element_ty), mask=m_v)
    if head == 0:
        tl.store(p_filled + row, tl.load(p_filled + row) + 1)
