"""Triton kernels of the short convolution over whole sequences: outputs, gradients, gradient of the state before them.

Nothing of the width of the inputs is kept between the passes: the backward pass sums the taps again. Token t of a
document that starts at token `start` reads inputs `t - s` for shifts s of 0 to W - 1; before the start it reads column
`W + t - s - start` of the document's state.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

INTEGERS = ["T", "D", "x_row", "blocks", "stretch"]


@triton.jit
def _input(
    p_x, p_state, o_t, start, sequence, m_t, o_d, m_d, origin, x_row, D, shift, W: tl.constexpr, STATE: tl.constexpr
):
    """Inputs `shift` tokens before o_t as float32; `p_x` points at token `origin`."""
    source = o_t - shift
    inside = (m_t & (source >= start))[:, None] & m_d[None, :]
    b_x = tl.load(p_x + (source - origin)[:, None] * x_row + o_d[None, :], mask=inside, other=0).to(tl.float32)
    if STATE:
        column = W + source - start
        past = (m_t & (source < start))[:, None] & m_d[None, :]
        p_past = p_state + sequence[:, None] * D * W + o_d[None, :] * W + column[:, None]
        b_x += tl.load(p_past, mask=past, other=0).to(tl.float32)
    return b_x


@triton.jit
def _document(p_start, p_sequence, o_t, m_t, i_b, PACKED: tl.constexpr):
    """First token and number of the document of each token."""
    if PACKED:
        start = tl.load(p_start + o_t, mask=m_t, other=0)
        sequence = tl.load(p_sequence + o_t, mask=m_t, other=0).to(tl.int64)
    else:
        start = o_t * 0
        sequence = start.to(tl.int64) + i_b
    return start, sequence


@triton.jit
def _even(D, x_row, EVEN: tl.constexpr):
    """Tells the compiler that every row begins at a multiple of 16 numbers, so that it moves 16 bytes at once."""
    if EVEN:
        D, x_row = D // 16 * 16, x_row // 16 * 16
    return D, x_row


@triton.jit
def _tap(p_weight, o_d, m_d, tap, W: tl.constexpr):
    return tl.load(p_weight + o_d * W + tap, mask=m_d, other=0).to(tl.float32)[None, :]


@triton.jit
def _sum(
    p_x, p_weight, p_bias, p_state, o_t, start, sequence, m_t, o_d, m_d, origin, x_row, D,
    W: tl.constexpr, BIASED: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The convolution at tokens o_t, before the activation."""
    b_y = tl.zeros([o_t.shape[0], o_d.shape[0]], tl.float32)
    if BIASED:
        b_y += tl.load(p_bias + o_d, mask=m_d, other=0).to(tl.float32)[None, :]
    for shift in tl.static_range(W):
        b_x = _input(p_x, p_state, o_t, start, sequence, m_t, o_d, m_d, origin, x_row, D, shift, W, STATE)
        b_y += b_x * _tap(p_weight, o_d, m_d, W - 1 - shift, W)
    return b_y


@triton.jit
def _before_activation(
    p_d_out, p_x, p_weight, p_bias, p_state, o_t, start, sequence, m_t, o_d, m_d, origin, x_row, D,
    W: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The gradient of the sums at tokens o_t; zero where masked."""
    m = m_t[:, None] & m_d[None, :]
    b_dy = tl.load(p_d_out + (o_t - origin)[:, None] * D + o_d[None, :], mask=m, other=0).to(tl.float32)
    if SILU:
        b_y = _sum(
            p_x, p_weight, p_bias, p_state, o_t, start, sequence, m_t, o_d, m_d, origin, x_row, D, W, BIASED, STATE
        )
        b_gate = tl.sigmoid(b_y)
        b_dy *= b_gate * (1 + b_y * (1 - b_gate))
    return b_dy


@triton.jit(do_not_specialize=INTEGERS)
def convolution_kernel(
    p_x, p_weight, p_bias, p_state, p_start, p_sequence, p_out, T, D, x_row, blocks,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    BIASED: tl.constexpr, SILU: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (row of the batch and block of tokens, block of channels)."""
    D, x_row = _even(D, x_row, EVEN)
    i_b, origin = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BT
    o_t, o_d = origin + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    first = i_b * T + origin
    start, sequence = _document(p_start, p_sequence, o_t, m_t, i_b, PACKED)
    b_y = _sum(
        p_x + first * x_row, p_weight, p_bias, p_state, o_t, start, sequence, m_t, o_d, m_d, origin, x_row, D,
        W, BIASED, STATE,
    )  # fmt: skip
    if SILU:
        b_y *= tl.sigmoid(b_y)
    p_block = p_out + first * D + (o_t - origin)[:, None] * D + o_d[None, :]
    tl.store(p_block, b_y.to(p_out.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=INTEGERS)
def gradient_kernel(
    p_d_out, p_x, p_weight, p_bias, p_state, p_start, p_sequence, p_d_x, p_sums, T, D, x_row, blocks, stretch,
    W: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    BIASED: tl.constexpr, SILU: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (row of the batch and stretch of tokens, block of channels).

    Writes the gradient of x, and into `sums` `[programs, W + 1, D]` what the stretch gives to the taps and the bias.
    """
    D, x_row = _even(D, x_row, EVEN)
    i_b, begin = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * stretch
    o_d, o_w = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BW)
    m_d = o_d < D
    b_sums = tl.zeros([BW, BD], tl.float32)
    for origin in range(begin, tl.minimum(begin + stretch, T), BT):
        o_t = origin + tl.arange(0, BT)
        first = i_b * T + origin
        start, sequence = _document(p_start, p_sequence, o_t, o_t < T, i_b, PACKED)
        b_dy = _before_activation(
            p_d_out + first * D, p_x + first * x_row, p_weight, p_bias, p_state, o_t, start, sequence, o_t < T, o_d,
            m_d, origin, x_row, D, W, BIASED, SILU, STATE,
        )  # fmt: skip
        b_sums += tl.where(o_w[:, None] == W, tl.sum(b_dy, axis=0)[None, :], 0.0)
        for shift in range(W):
            b_x = _input(
                p_x + first * x_row, p_state, o_t, start, sequence, o_t < T, o_d, m_d, origin, x_row, D, shift, W, STATE
            )
            b_sums += tl.where(o_w[:, None] == W - 1 - shift, tl.sum(b_dy * b_x, axis=0)[None, :], 0.0)
        b_dx = b_dy * _tap(p_weight, o_d, m_d, W - 1, W)
        # Loops that are not unrolled: the sums of all shifts at once would not fit the registers.
        for shift in range(1, W):
            # What token t + shift takes from token t, if both are of one document.
            o_later = o_t + shift
            m_later = o_later < T
            start, sequence = _document(p_start, p_sequence, o_later, m_later, i_b, PACKED)
            m_later &= start <= o_t
            b_dy = _before_activation(
                p_d_out + first * D, p_x + first * x_row, p_weight, p_bias, p_state, o_later, start, sequence,
                m_later, o_d, m_d, origin, x_row, D, W, BIASED, SILU, STATE,
            )  # fmt: skip
            b_dx += b_dy * _tap(p_weight, o_d, m_d, W - 1 - shift, W)
        p_block = p_d_x + first * D + (o_t - origin)[:, None] * D + o_d[None, :]
        tl.store(p_block, b_dx.to(p_d_x.dtype.element_ty), mask=(o_t < T)[:, None] & m_d[None, :])
    p_row = p_sums + tl.program_id(0).to(tl.int64) * (W + 1) * D
    tl.store(p_row + o_w[:, None] * D + o_d[None, :], b_sums, mask=(o_w <= W)[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=INTEGERS)
def state_gradient_kernel(
    p_d_out, p_x, p_weight, p_bias, p_state, p_begin, p_end, p_d_state, D, x_row,
    W: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
    BIASED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Program (document, block of channels): the first W - 1 tokens read the state. Begin and end count all rows."""
    i_s = tl.program_id(0).to(tl.int64)
    o_d, o_w = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BW)
    m_d = o_d < D
    begin = tl.load(p_begin + i_s)
    o_p = tl.arange(0, BW)
    m_p = (o_p < W - 1) & (begin + o_p < tl.load(p_end + i_s))
    zero = o_p * 0
    b_dy = _before_activation(
        p_d_out + begin * D, p_x + begin * x_row, p_weight, p_bias, p_state, o_p, zero, zero.to(tl.int64) + i_s,
        m_p, o_d, m_d, 0, x_row, D, W, BIASED, SILU, True,
    )  # fmt: skip
    b_d_state = tl.zeros([BW, BD], tl.float32)
    for shift in tl.static_range(1, W):
        # Token p reads column W + p - shift.
        reads = (o_w[:, None] == W + o_p[None, :] - shift) & (o_p < shift)[None, :]
        b_part = tl.sum(tl.where(reads[:, :, None], b_dy[None, :, :], 0.0), axis=1)
        b_d_state += b_part * _tap(p_weight, o_d, m_d, W - 1 - shift, W)
    p_block = p_d_state + i_s * D * W + o_d[None, :] * W + o_w[:, None]
    tl.store(p_block, b_d_state.to(p_d_state.dtype.element_ty), mask=(o_w < W)[:, None] & m_d[None, :])
