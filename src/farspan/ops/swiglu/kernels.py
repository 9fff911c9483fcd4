"""Triton kernels of SiLU(gate) ∘ up for slices of one tensor, and of its gradients."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(p_gate, p_up, p_out, gate_row, up_row, F, BF: tl.constexpr):
    """Program (row, block of channels); `*_row` are the distances of rows."""
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_gate = tl.load(p_gate + i_row * gate_row + o_f, mask=m_f, other=0).to(tl.float32)
    b_up = tl.load(p_up + i_row * up_row + o_f, mask=m_f, other=0)
    # Rounded as the unfused form rounds: SiLU to the dtype of the stream, then the product.
    b_gate = (b_gate * tl.sigmoid(b_gate)).to(b_up.dtype).to(tl.float32)
    tl.store(p_out + i_row * F + o_f, (b_gate * b_up.to(tl.float32)).to(p_out.dtype.element_ty), mask=m_f)


@triton.jit
def gradient_kernel(p_d_out, p_gate, p_up, p_d_gate, p_d_up, d_row, gate_row, up_row, F, BF: tl.constexpr):
    """Programs as above; the gradients have no gaps between their rows."""
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_d_out = tl.load(p_d_out + i_row * d_row + o_f, mask=m_f, other=0).to(tl.float32)
    b_gate = tl.load(p_gate + i_row * gate_row + o_f, mask=m_f, other=0).to(tl.float32)
    b_up = tl.load(p_up + i_row * up_row + o_f, mask=m_f, other=0).to(tl.float32)
    b_open = tl.sigmoid(b_gate)
    b_d_gate = b_d_out * b_up * b_open * (1 + b_gate * (1 - b_open))
    tl.store(p_d_gate + i_row * F + o_f, b_d_gate.to(p_d_gate.dtype.element_ty), mask=m_f)
    tl.store(p_d_up + i_row * F + o_f, (b_d_out * b_gate * b_open).to(p_d_up.dtype.element_ty), mask=m_f)
