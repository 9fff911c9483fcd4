"""Triton kernel of one decoding step of cosine attention: rotation, norms, length factor and recurrence in one pass."""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.rotary_kernels import rotated


@triton.jit
def step_kernel(
    p_q,
    p_k,
    p_v,
    p_exponent,
    p_count,
    p_cos,
    p_sin,
    p_state,
    p_out,
    eps,
    q_row,
    k_row,
    v_row,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COUNTED: tl.constexpr,
    BY_QUERY: tl.constexpr,
):
    """Program (row, head); `*_row` are the distances of batch rows; the count is that before this token."""
    i_b, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    p_row_cos, p_row_sin = p_cos + i_b * (R // 2), p_sin + i_b * (R // 2)
    b_q = rotated(p_q + i_b * q_row + i_h * K, o_k, m_k, p_row_cos, p_row_sin, R, INTERLEAVED)
    b_k = rotated(p_k + i_b * k_row + i_h * K, o_k, m_k, p_row_cos, p_row_sin, R, INTERLEAVED)
    b_q = b_q / tl.maximum(tl.sqrt(tl.sum(b_q * b_q, axis=0)), eps)
    b_k = b_k / tl.maximum(tl.sqrt(tl.sum(b_k * b_k, axis=0)), eps)
    if COUNTED:
        count = tl.load(p_count + i_b).to(tl.float32) + 1
        factor = tl.exp(-tl.sigmoid(tl.load(p_exponent + i_h).to(tl.float32)) * tl.log(count))
        if BY_QUERY:
            b_q *= factor
        else:
            b_k *= factor
    b_v = tl.load(p_v + i_b * v_row + i_h * V + o_v, mask=m_v, other=0).to(tl.float32)
    o_state = (i_b * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    b_state = tl.load(p_state + o_state, mask=m_state, other=0.0) + b_k[:, None] * b_v[None, :]
    tl.store(p_state + o_state, b_state, mask=m_state)
    b_o = tl.sum(b_q[:, None] * b_state, axis=0)
    tl.store(p_out + (i_b * H + i_h) * V + o_v, b_o.to(p_out.dtype.element_ty), mask=m_v)
