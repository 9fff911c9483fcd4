"""Triton kernel of SiLU(gate) ∘ up for slices of one tensor."""

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
