"""Triton kernels of SiLU(gate) ∘ up for slices of one tensor, and of its gradients."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _even(row, EVEN: tl.constexpr):
    """Tells the compiler that a size or distance is a multiple of 16, so that it moves 16 bytes at once."""
    return row // 16 * 16 if EVEN else row


@triton.jit(do_not_specialize=["gate_row", "up_row", "F"])
def swiglu_kernel(p_gate, p_up, p_out, gate_row, up_row, F, BF: tl.constexpr, EVEN: tl.constexpr):
    """Program (row, block of channels); `*_row` are the distances of rows, with EVEN multiples of 16 as F is."""
    gate_row, up_row, F = _even(gate_row, EVEN), _even(up_row, EVEN), _even(F, EVEN)
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_gate = tl.load(p_gate + i_row * gate_row + o_f, mask=m_f, other=0).to(tl.float32)
    b_up = tl.load(p_up + i_row * up_row + o_f, mask=m_f, other=0)
    # Rounded as the unfused form rounds: SiLU to the dtype of the stream, then the product.
    b_gate = (b_gate * tl.sigmoid(b_gate)).to(b_up.dtype).to(tl.float32)
    tl.store(p_out + i_row * F + o_f, (b_gate * b_up.to(tl.float32)).to(p_out.dtype.element_ty), mask=m_f)


@triton.jit(do_not_specialize=["d_row", "gate_row", "up_row", "F"])
def gradient_kernel(
    p_d_out, p_gate, p_up, p_d_gate, p_d_up, d_row, gate_row, up_row, F, BF: tl.constexpr, EVEN: tl.constexpr
):
    """Programs as above; the gradients have no gaps between their rows."""
    d_row, gate_row, up_row, F = _even(d_row, EVEN), _even(gate_row, EVEN), _even(up_row, EVEN), _even(F, EVEN)
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
