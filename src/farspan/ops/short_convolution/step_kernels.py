"""Triton kernel of one step of the short convolution: shift the state, append the input, dot, activation."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def step_kernel(
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_out,
    D,
    W: tl.constexpr,
    BW: tl.constexpr,
    BD: tl.constexpr,
    BIASED: tl.constexpr,
    SILU: tl.constexpr,
):
    """Program (row, block of channels); x, out `[B, D]`, state `[B, D, W]`, weight `[D, W]`."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d, o_w = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BW)
    m_d = o_d < D
    p_row = p_state + i_b * D * W
    b_x = tl.load(p_x + i_b * D + o_d, mask=m_d, other=0)
    m_old = m_d[:, None] & (o_w < W - 1)[None, :]
    b_old = tl.load(p_row + o_d[:, None] * W + o_w[None, :] + 1, mask=m_old, other=0)
    b_state = tl.where((o_w == W - 1)[None, :], b_x.to(b_old.dtype)[:, None], b_old)
    m_new = m_d[:, None] & (o_w < W)[None, :]
    b_weight = tl.load(p_weight + o_d[:, None] * W + o_w[None, :], mask=m_new, other=0)
    b_out = tl.sum(tl.where(m_new, b_state.to(tl.float32) * b_weight.to(tl.float32), 0.0), axis=1)
    if BIASED:
        b_out += tl.load(p_bias + o_d, mask=m_d, other=0).to(tl.float32)
    if SILU:
        b_out *= tl.sigmoid(b_out)
    # A store may not pass the loads of the same program, whose columns it overwrites.
    tl.debug_barrier()
    tl.store(p_row + o_d[:, None] * W + o_w[None, :], b_state, mask=m_new)
    tl.store(p_out + i_b * D + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)
