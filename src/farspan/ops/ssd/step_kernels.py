"""Triton kernel of one decoding step of state space duality: step size, decay, rotation, recurrence and skip."""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.rotary_kernels import rotated


@triton.jit
def step_kernel(
    p_x,
    p_dt,
    p_a,
    p_b,
    p_c,
    p_d,
    p_bias,
    p_cos,
    p_sin,
    p_state,
    p_out,
    low,
    high,
    x_row,
    dt_row,
    b_row,
    c_row,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BIASED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Program (row, head), which reads group ⌊h G / H⌋; `*_row` are the distances of batch rows."""
    i_b, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_g = i_h // (H // G)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    step = tl.load(p_dt + i_b * dt_row + i_h).to(tl.float32)
    if BIASED:
        step += tl.load(p_bias + i_h).to(tl.float32)
    if SOFTPLUS:
        # ln(1 + e^s) = max(s, 0) + ln(1 + e^−|s|); the series keeps what 1 + x would round away.
        x = tl.exp(-tl.abs(step))
        step = tl.maximum(step, 0.0) + tl.where(x < 0.01, x * (1 - x * (0.5 - x * (1.0 / 3))), tl.log(1 + x))
    step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp(step * tl.load(p_a + i_h).to(tl.float32))
    p_row_cos, p_row_sin = p_cos + i_b * (R // 2), p_sin + i_b * (R // 2)
    b_b = rotated(p_b + i_b * b_row + i_g * K, o_k, m_k, p_row_cos, p_row_sin, R, False)
    b_c = rotated(p_c + i_b * c_row + i_g * K, o_k, m_k, p_row_cos, p_row_sin, R, False)
    b_x = tl.load(p_x + i_b * x_row + i_h * V + o_v, mask=m_v, other=0).to(tl.float32)
    o_state = (i_b * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    b_state = decay * tl.load(p_state + o_state, mask=m_state, other=0.0) + b_b[:, None] * (step * b_x)[None, :]
    tl.store(p_state + o_state, b_state, mask=m_state)
    b_o = tl.sum(b_c[:, None] * b_state, axis=0)
    if SKIP:
        b_o += tl.load(p_d + i_h).to(tl.float32) * b_x
    tl.store(p_out + (i_b * H + i_h) * V + o_v, b_o.to(p_out.dtype.element_ty), mask=m_v)
