"""Triton kernels of the short convolution over whole sequences: outputs, and all gradients.

A program walks some tokens one by one, a block of channels at a time, and holds in registers what neighbours share: the
last W inputs, and backwards the gradients of the W - 1 later sums that read a token. Every number is read once. Nothing
is kept between the passes: the backward pass sums the taps again. Token t of a document that starts at token `start`
reads inputs `t - s` for shifts s of 0 to W - 1; before the start it reads column `W + t - s - start` of the document's
state.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton knows no unpacking inside of a tuple
import triton
import triton.language as tl

INTEGERS = ["T", "D", "x_row", "blocks", "stretch"]


@triton.jit
def _even(D, x_row, EVEN: tl.constexpr):
    """Tells the compiler that every row begins at a multiple of 16 numbers, so that it moves 16 bytes at once."""
    if EVEN:
        D, x_row = D // 16 * 16, x_row // 16 * 16
    return D, x_row


@triton.jit
def _taps(p_weight, p_bias, o_d, m_d, W: tl.constexpr, BIASED: tl.constexpr):
    """The weights of the W taps, and the bias, `[BD]` each."""
    taps = ()
    for tap in tl.static_range(W):
        taps = taps + (tl.load(p_weight + o_d * W + tap, mask=m_d, other=0).to(tl.float32),)
    b_bias = tl.zeros_like(taps[0])
    if BIASED:
        b_bias = tl.load(p_bias + o_d, mask=m_d, other=0).to(tl.float32)
    return taps, b_bias


@triton.jit
def _document(p_start, p_sequence, t, T, i_b, PACKED: tl.constexpr):
    """First token and number of the document of token t."""
    if PACKED:
        inside = (t >= 0) & (t < T)
        return tl.load(p_start + t, mask=inside, other=0), tl.load(p_sequence + t, mask=inside, other=0).to(tl.int64)
    return t * 0, i_b


@triton.jit
def _if(condition, o_d, D):
    """The channels that exist, or none."""
    return o_d < tl.where(condition, D, 0)


@triton.jit
def _row(p_x, t, begin, T, x_row, o_d, D):
    """Row t, zeros outside of the sequence; `p_x` points at row `begin`."""
    return tl.load(p_x + (t - begin) * x_row + o_d, mask=_if((t >= 0) & (t < T), o_d, D), other=0)


@triton.jit
def _sum(
    recent, taps, b_bias, p_state, t, start, sequence, T, D, o_d,
    W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The sum of token t and the W inputs it read, of which `recent` holds those of its sequence."""
    b_y, inputs = b_bias, ()
    for shift in tl.static_range(W):
        b_x = recent[shift]
        if PACKED:
            b_x = tl.where(t - shift >= start, b_x, 0.0)
        if STATE:
            past = _if((t - shift < start) & (t >= 0) & (t < T), o_d, D)
            b_x += tl.load(p_state + (sequence * D + o_d) * W + W + t - shift - start, mask=past, other=0).to(
                tl.float32
            )
        b_y += b_x * taps[W - 1 - shift]
        inputs = inputs + (b_x,)
    return b_y, inputs


@triton.jit(do_not_specialize=INTEGERS)
def convolution_kernel(
    p_x, p_weight, p_bias, p_state, p_start, p_sequence, p_out, T, D, x_row, blocks, stretch,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    BIASED: tl.constexpr, SILU: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (row of the batch and stretch of tokens, block of channels)."""
    D, x_row = _even(D, x_row, EVEN)
    i_b, begin = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * stretch
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    p_x, p_out = p_x + (i_b * T + begin) * x_row, p_out + (i_b * T + begin) * D
    taps, b_bias = _taps(p_weight, p_bias, o_d, o_d < D, W, BIASED)
    recent = ()
    for shift in tl.static_range(1, W + 1):
        recent = recent + (_row(p_x, begin - shift, begin, T, x_row, o_d, D).to(tl.float32),)
    for walked in range(0, tl.minimum(stretch, T - begin), BT):
        rows = ()
        for i in tl.static_range(BT):
            rows = rows + (_row(p_x, begin + walked + i, begin, T, x_row, o_d, D),)
        for i in tl.static_range(BT):
            t = begin + walked + i
            recent = (rows[i].to(tl.float32),) + recent[: W - 1]
            start, sequence = _document(p_start, p_sequence, t, T, i_b, PACKED)
            b_y, _ = _sum(recent, taps, b_bias, p_state, t, start, sequence, T, D, o_d, W, STATE, PACKED)
            if SILU:
                b_y *= tl.sigmoid(b_y)
            tl.store(p_out + (t - begin) * D + o_d, b_y.to(p_out.dtype.element_ty), mask=_if(t < T, o_d, D))


@triton.jit(do_not_specialize=INTEGERS)
def gradient_kernel(
    p_d_out, p_x, p_weight, p_bias, p_state, p_start, p_sequence, p_d_x, p_sums, p_d_state,
    T, D, x_row, blocks, stretch,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    BIASED: tl.constexpr, SILU: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (row of the batch and stretch of tokens, block of channels), from the last token to the first.

    Writes the gradients of x and of the states of documents with a token, and into `sums` `[programs, W + 1, D]` what
    the stretch gives to the taps and the bias.
    """
    D, x_row = _even(D, x_row, EVEN)
    i_b, begin = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * stretch
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    p_x, skipped = p_x + (i_b * T + begin) * x_row, (i_b * T + begin) * D
    p_d_out, p_d_x = p_d_out + skipped, p_d_x + skipped
    taps, b_bias = _taps(p_weight, p_bias, o_d, m_d, W, BIASED)
    b_zero = tl.zeros([BD], tl.float32)
    end = tl.minimum(begin + stretch, T)
    last = end + W - 2
    recent, later, sums = (b_zero,), (b_zero,) * W, (b_zero,) * (W + 1)
    starts = (begin,) * W
    for shift in tl.static_range(W - 1):
        recent = recent + (_row(p_x, last - shift, begin, T, x_row, o_d, D).to(tl.float32),)
    for walked in range(0, last + 1 - begin, BT):
        rows, gradients = (), ()
        for i in tl.static_range(BT):
            rows = rows + (_row(p_x, last - walked - i - (W - 1), begin, T, x_row, o_d, D),)
            gradients = gradients + (_row(p_d_out, last - walked - i, begin, T, D, o_d, D),)
        for i in tl.static_range(BT):
            t = last - walked - i
            recent = recent[1:] + (rows[i].to(tl.float32),)
            start, sequence = _document(p_start, p_sequence, t, T, i_b, PACKED)
            b_y, inputs = _sum(recent, taps, b_bias, p_state, t, start, sequence, T, D, o_d, W, STATE, PACKED)
            b_dy = gradients[i].to(tl.float32)
            if SILU:
                b_gate = tl.sigmoid(b_y)
                b_dy = tl.where(t < T, b_dy * b_gate * (1 + b_y * (1 - b_gate)), 0.0)
            later, starts = (b_dy,) + later[: W - 1], (start,) + starts[: W - 1]
            b_dx = b_dy * taps[W - 1]
            for shift in tl.static_range(1, W):
                b_dx += tl.where(starts[shift] <= t, later[shift], 0.0) * taps[W - 1 - shift]
            own = (t >= begin) & (t < end)
            tl.store(p_d_x + (t - begin) * D + o_d, b_dx.to(p_d_x.dtype.element_ty), mask=_if(own, o_d, D))
            b_dy = tl.where(own, b_dy, 0.0)
            added = ()
            for tap in tl.static_range(W):
                added = added + (sums[tap] + b_dy * inputs[W - 1 - tap],)
            sums = added + (sums[W] + b_dy,)
            if STATE:
                if own & (t == start):
                    # What the document's first tokens took from the column that stands W - column before it.
                    for column in tl.static_range(W):
                        b_part = b_zero
                        for p in tl.static_range(column):
                            b_part += tl.where(starts[p] == start, later[p], 0.0) * taps[column - 1 - p]
                        p_part = p_d_state + (sequence * D + o_d) * W + column
                        tl.store(p_part, b_part.to(p_d_state.dtype.element_ty), mask=m_d)
    p_row = p_sums + tl.program_id(0).to(tl.int64) * (W + 1) * D + o_d
    for tap in tl.static_range(W + 1):
        tl.store(p_row + tap * D, sums[tap], mask=m_d)
