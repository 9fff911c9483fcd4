"""Triton kernel of one decoding step of MetaLA: gate, recurrence, self-augmentation, norm and output gate in one pass.

One program a head and row: it reads the state once, writes it once, in place, and keeps the rest in registers.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from farspan.ops.gated_linear.kernels import _gate


@triton.jit
def step_kernel(
    p_q,
    p_z,
    p_k,
    p_v,
    p_w,
    p_gate,
    p_state,
    p_out,
    scale,
    tau,
    eps,
    q_row,
    z_row,
    k_row,
    v_row,
    gate_row,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OWN_KEY: tl.constexpr,
    AUGMENT: tl.constexpr,
    INSIDE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATED: tl.constexpr,
):
    """`*_row` are the distances of batch rows, so that slices of one fused projection need no copy."""
    i_b, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    b_q = tl.load(p_q + i_b * q_row + i_h * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_z = tl.load(p_z + i_b * z_row + i_h * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_v = tl.load(p_v + i_b * v_row + i_h * V + o_v, mask=m_v, other=0).to(tl.float32)
    b_a, b_k = _gate(b_z, tau, 0)
    if OWN_KEY:
        b_k = tl.load(p_k + i_b * k_row + i_h * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_k = tl.where(m_k, b_k, 0.0)
    o_state = (i_b * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
    b_state = tl.exp(b_a)[:, None] * b_state + b_k[:, None] * b_v[None, :]
    tl.store(p_state + o_state, b_state, mask=m_state)
    b_o = scale * tl.sum(b_q[:, None] * b_state, axis=0)
    if AUGMENT:
        b_w = tl.load(p_w + i_h * K + o_k, mask=m_k, other=0).to(tl.float32)
        b_u = tl.sum(b_q * b_k * b_w, axis=0)
        b_o += tl.sigmoid(b_u * b_v) if INSIDE else tl.sigmoid(b_u) * b_v
    if NORMALIZE:
        mean = tl.sum(tl.where(m_v, b_o, 0.0), axis=0) / V
        b_c = tl.where(m_v, b_o - mean, 0.0)
        b_o = b_c * tl.rsqrt(tl.sum(b_c * b_c, axis=0) / V + eps)
    if GATED:
        b_gate = tl.load(p_gate + i_b * gate_row + i_h * V + o_v, mask=m_v, other=0).to(tl.float32)
        # Rounded as the unfused form rounds, which gates in the dtype of the activations.
        b_o = b_o.to(p_out.dtype.element_ty).to(tl.float32)
        b_o *= (b_gate * tl.sigmoid(b_gate)).to(p_out.dtype.element_ty).to(tl.float32)
    tl.store(p_out + (i_b * H + i_h) * V + o_v, b_o.to(p_out.dtype.element_ty), mask=m_v)
