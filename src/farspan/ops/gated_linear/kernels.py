"""Triton kernels of gated linear attention and MetaLA.

Forward: `prepare_kernel` brings decay and scale into queries and keys, `state_kernel` gives what each segment adds,
`scan_kernel` the state entering each segment, `state_kernel` again the state entering each chunk, `output_kernel` the
outputs, one program per chunk. Backward: `norm_kernel` (MetaLA alone), the state kernels in reverse, which give the
gradient of the state leaving each chunk, and `gradient_kernel`. A segment is some hundred tokens, so that the time
depends on the number of tokens only.

Conventions: tensors are contiguous `[N, H, K]` over all tokens of all sequences; tables of int32 say where segments and
chunks lie, which serves batches and packed documents alike. `i_` program index, `o_` offsets, `m_` mask, `b_` block in
registers, `p_` pointer. `DECAY` is 0 for none, 1 for one number per head, 2 for one per channel, 3 for gate logits that
give both the decay and the key. `DOT` is the dtype of matrix operands, accumulation is float32. `FAST` allows errors far
below 16 bits: sums of decays by products with a triangle of ones, in two parts of `PART`, and with `FAST` = 2 the
hardware's exponential, logarithm and reciprocal, which the interpreter does not know.

Decays of a chunk: with G the inclusive sum of log decays, m = (G_first + G_last) / 2 its centre and h half of its range
(both stored for every chunk and channel), queries are kept as `q~ = scale q e^(G - m)`, keys as `k~ = k e^(m - G)`, the
state entering the chunk as `S~ = e^m S` and the gradient of the state leaving it as `dS~ = e^-h dS`. Then

    o = tril(q~ k~^T) v + q~ S~,    S_next = e^(m - h) S + e^-h k~^T v,    dS_before = e^(m - h) dS + e^m q~^T do
    dq~ = tril(do v^T) k~ + do S~^T,    dk~ = tril(do v^T)^T q~ + v dS~^T,    dv = tril(q~ k~^T)^T do + k~ dS~
    dg_t = sum_{s >= t} (q~ dq~ - k~ dk~)_s + rowsum(S~ dS~) + sum_s k~_s (v dS~^T)_s

at the cost of no decay at all. Where some h exceeds `LIMIT` the four are kept without their factors; then rows of second
halves meet columns of first halves, for halves of 32, 16, ..., 1 rows, with exponents <= 0 throughout. Entries above the
diagonal may be infinite: they are selected away, never multiplied by a mask. Products are transposed by exchanging
their operands, never by transposing a result.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# exp of this is 0 in float32; sums of log decays stay small where a decay is 0.
LOG_ZERO = tl.constexpr(-200.0)


@triton.jit
def _exp(x, FAST: tl.constexpr):
    if FAST == 2:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2E], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    if FAST == 2:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + _exp(-x, FAST)], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.sigmoid(x)


@triton.jit
def _gate(z, tau, FAST: tl.constexpr):
    """`a = logsigmoid(z) / tau` and `1 - exp(a)`; unless `FAST`, both with small relative error near 0."""
    x = _exp(-tl.abs(z), FAST)
    if FAST == 2:
        log = LN2 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1 + x], dtype=tl.float32, is_pure=True, pack=1
        )
    elif FAST == 1:
        log = tl.log(1 + x)
    else:
        log = tl.where(x < 0.01, x * (1 - x * (0.5 - x * (1.0 / 3))), tl.log(1 + x))
    a = (tl.minimum(z, 0.0) - log) * (1 / tau)
    k = 1 - _exp(a, FAST)
    if FAST == 0:
        k = tl.where(a > -0.05, -a * (1 + a * (0.5 + a * (1.0 / 6 + a * (1.0 / 24)))), k)
    return a, k


@triton.jit
def _key_and_decay(
    k, gate, row, o_rows, o_columns, m_rows, mask, tau,
    H: tl.constexpr, K: tl.constexpr, DECAY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gate logit, key and log decay of a tile in float32; rows outside the sequence write nothing and decay by 1."""
    offset = row * K + o_rows * (H * K) + o_columns
    z = tl.zeros(mask.shape, tl.float32)
    if DECAY == 3:
        z = tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)
        b_g, b_k = _gate(z, tau, FAST)
        b_g, b_k = tl.where(mask, b_g, 0.0), tl.where(mask, b_k, 0.0)
    else:
        b_k = tl.load(k + offset, mask=mask, other=0.0).to(tl.float32)
        b_g = z
        if DECAY == 2:
            b_g = tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)
        if DECAY == 1:
            b_g = z + tl.load(gate + row + o_rows * H, mask=m_rows, other=0.0).to(tl.float32)
    return z, b_k, tl.maximum(b_g, LOG_ZERO)


@triton.jit
def _cumsum(x, REVERSE: tl.constexpr, BT: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr):
    """Inclusive sums down the rows, or up."""
    if FAST == 0:
        return tl.cumsum(x, axis=0, reverse=REVERSE)
    o_t = tl.arange(0, BT)
    ones = o_t[:, None] <= o_t[None, :] if REVERSE else o_t[:, None] >= o_t[None, :]
    ones, large = ones.to(PART), x.to(PART)
    return tl.dot(ones, large) + tl.dot(ones, (x - large.to(tl.float32)).to(PART))


@triton.jit
def _add_from(a, a_starts, b, b_starts):
    return tl.where(b_starts != 0, b, a + b), a_starts | b_starts


@triton.jit
def _halves(b_g, o_t, size):
    """What second halves have lost since the middle of their pair, and first halves until it; 0 on the other rows."""
    place = o_t[:, None] % size
    zero = (b_g * 0).to(tl.int32)
    since, _ = tl.associative_scan((b_g, zero + (place == 0).to(tl.int32)), 0, _add_from)
    until, _ = tl.associative_scan((b_g, zero + (place == size - 1).to(tl.int32)), 0, _add_from, reverse=True)
    second = (o_t[:, None] // size) % 2 == 1
    return tl.where(second, tl.exp(since), 0.0), tl.where(second, 0.0, tl.exp(until - b_g))


@triton.jit
def _pairs(o_t, size):
    return (o_t[:, None] // (2 * size)) == (o_t[None, :] // (2 * size))


@triton.jit
def prepare_kernel(
    q, k, gate, weight, q_tilde, k_tilde, centre, half, u, chunks, scale, tau,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, AUGMENT: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Queries and keys of one chunk with their decays, the chunk's centre and half range, and MetaLA's `u`."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_t = tl.arange(0, BK), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    m_t = (t + o_t) < last
    mask = m_t[:, None] & (o_k < K)[None, :]
    o_x = o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q + row * K + o_x, mask=mask, other=0.0).to(tl.float32)
    _, b_k, b_g = _key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, FAST)
    if AUGMENT:
        b_w = tl.load(weight + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        tl.store(u + row + o_t * H, tl.sum(b_q * b_k * b_w[None, :], axis=1), mask=m_t)
    b_q *= scale
    if DECAY != 0:
        is_first = (o_t == 0)[:, None]
        b_first = tl.sum(tl.where(is_first, b_g, 0.0), axis=0)
        b_g = tl.where(is_first, 0.0, b_g)
        b_half = -0.5 * tl.sum(b_g, axis=0)
        p_c = (i_c.to(tl.int64) * H + i_h) * K + o_k
        tl.store(centre + p_c, b_first - b_half, mask=o_k < K)
        tl.store(half + p_c, b_half, mask=o_k < K)
        b_offset = _cumsum(b_g, False, BT, FAST, PART) + b_half[None, :]
        b_offset = tl.where(tl.max(b_half, axis=0) <= LIMIT, b_offset, 0.0)
        b_q *= _exp(b_offset, FAST)
        b_k *= _exp(-b_offset, FAST)
    tl.store(q_tilde + row * K + o_x, b_q.to(q_tilde.dtype.element_ty), mask=mask)
    tl.store(k_tilde + row * K + o_x, b_k.to(k_tilde.dtype.element_ty), mask=mask)


@triton.jit
def _is_extreme(half, place, K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, LIMIT: tl.constexpr):
    """Whether half of the range of a chunk's decays exceeds the limit in some channel."""
    if DECAY == 0:
        return False
    o_k = tl.arange(0, BK)
    return tl.max(tl.load(half + place * K + o_k, mask=o_k < K, other=0.0), axis=0) > LIMIT


@triton.jit
def state_kernel(
    x, y, gate, centre, half, start, end, lost, states, segments, tau,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr,
    STORE_STATES: tl.constexpr, STORE_END: tl.constexpr, STORE_LOST: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks a segment: forward with x = k~, y = v for the states, in reverse with x = q~, y = do for their gradients."""
    i_s, i_h, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, chunk = tl.load(segments + 3 * i_s), tl.load(segments + 3 * i_s + 1), tl.load(segments + 3 * i_s + 2)
    count = tl.cdiv(last - first, BT)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    o_s = o_k[:, None] * V + o_v[None, :]
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    own = (i_s.to(tl.int64) * H + i_h) * (K * V)
    b_s = tl.zeros([BK, BV], tl.float32)
    if HAS_START:
        b_s += tl.load(start + own + o_s, mask=m_s, other=0.0).to(tl.float32)
    b_lost = tl.zeros([BK], tl.float32)
    for i in range(count):
        c = count - 1 - i if REVERSE else i
        t = first + c * BT
        row = t.to(tl.int64) * H + i_h
        m_t = (t + o_t) < last
        mask = m_k[:, None] & m_t[None, :]
        b_x = tl.load(x + row * K + o_t[None, :] * (H * K) + o_k[:, None], mask=mask, other=0.0)
        p_y = y + row * V + o_t[:, None] * (H * V) + o_v[None, :]
        b_y = tl.load(p_y, mask=m_t[:, None] & m_v[None, :], other=0.0)
        place = (chunk + c).to(tl.int64) * H + i_h
        p_states = states + place * (K * V) + o_s
        if DECAY == 0:
            if STORE_STATES:
                tl.store(p_states, b_s.to(states.dtype.element_ty), mask=m_s)
            b_s += tl.dot(b_x.to(DOT), b_y.to(DOT), input_precision=PRECISION)
        else:
            b_m = tl.load(centre + place * K + o_k, mask=m_k, other=0.0)
            b_h = tl.load(half + place * K + o_k, mask=m_k, other=0.0)
            b_lost += b_m - b_h
            b_keep = tl.exp(b_m - b_h)
            b_in, b_out = tl.exp(b_m), tl.exp(-b_h)
            if tl.max(b_h, axis=0) > LIMIT:
                b_in, b_out = b_in * 0 + 1, b_out * 0 + 1
                _, _, b_g = _key_and_decay(
                    x, gate, row, o_t[None, :], o_k[:, None], m_t[None, :], mask, tau, H, K, DECAY, 0
                )
                if REVERSE:
                    b_x = (b_x.to(tl.float32) * tl.exp(tl.cumsum(b_g, axis=1))).to(x.dtype.element_ty)
                else:
                    b_until = tl.exp(tl.cumsum(b_g, axis=1, reverse=True) - b_g)
                    b_x = (b_x.to(tl.float32) * b_until).to(x.dtype.element_ty)
            b_here = b_out if REVERSE else b_in
            b_added = b_in if REVERSE else b_out
            if STORE_STATES:
                tl.store(p_states, (b_s * b_here[:, None]).to(states.dtype.element_ty), mask=m_s)
            b_new = tl.dot(b_x.to(DOT), b_y.to(DOT), input_precision=PRECISION)
            b_s = b_s * b_keep[:, None] + b_new * b_added[:, None]
    if STORE_END:
        tl.store(end + own + o_s, b_s, mask=m_s)
    if STORE_LOST:
        tl.store(lost + (i_s.to(tl.int64) * H + i_h) * K + o_k, b_lost, mask=m_k)


@triton.jit
def scan_kernel(
    added, lost, initial, start, final, offsets,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state entering every segment of a sequence from what the segments add."""
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
    o_n = i_b * BN + tl.arange(0, BN)
    m_n = o_n < K * V
    own = (i_n.to(tl.int64) * H + i_h) * (K * V)
    b_s = tl.load(initial + own + o_n, mask=m_n, other=0.0)
    base = (last - 1 if REVERSE else first).to(tl.int64) * H + i_h
    b_added = tl.load(added + base * (K * V) + o_n, mask=m_n, other=0.0)
    b_lost = tl.load(lost + base * K + o_n // V, mask=m_n, other=0.0)
    for i in range(first, last):
        tl.store(start + base * (K * V) + o_n, b_s, mask=m_n)
        b_s = b_s * tl.exp(b_lost) + b_added
        base += -H if REVERSE else H  # the next segment is read while this one is written
        m_next = m_n & (i + 1 < last)
        b_added = tl.load(added + base * (K * V) + o_n, mask=m_next, other=0.0)
        b_lost = tl.load(lost + base * K + o_n // V, mask=m_next, other=0.0)
    tl.store(final + own + o_n, b_s, mask=m_n)


@triton.jit
def output_kernel(
    q_tilde, k_tilde, v, gate, half, u, states, out, rstd, chunks, tau, eps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr, EXTREME: tl.constexpr, AUGMENT: tl.constexpr,
    INSIDE: tl.constexpr, NORMALIZE: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, with MetaLA's augmentation and norm when asked for; of moderate or `EXTREME` chunks."""
    i_c, i_h, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = i_c.to(tl.int64) * H + i_h
    if _is_extreme(half, place, K, BK, DECAY, LIMIT) != EXTREME:
        return
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    m_t, m_k = (t + o_t) < last, o_k < K
    mask = m_t[:, None] & m_k[None, :]
    m_v = m_t[:, None] & (o_v < V)[None, :]
    o_x = row * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q_tilde + o_x, mask=mask, other=0.0).to(DOT)
    b_k = tl.load(k_tilde + o_x, mask=mask, other=0.0).to(DOT)
    b_v = tl.load(v + row * V + o_t[:, None] * (H * V) + o_v[None, :], mask=m_v, other=0.0)
    p_s = states + place * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = tl.load(p_s, mask=m_k[:, None] & (o_v < V)[None, :], other=0.0).to(DOT)
    b_a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if EXTREME:
        _, _, b_g = _key_and_decay(
            k_tilde, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, 0
        )
        b_q32, b_k32 = b_q.to(tl.float32), b_k.to(tl.float32)
        b_a = tl.where(o_t[:, None] == o_t[None, :], tl.sum(b_q32 * b_k32, axis=1)[:, None], 0.0)
        for level in range(LEVELS):
            size = BT >> (level + 1)
            b_since, b_until = _halves(b_g, o_t, size)
            b_up, b_down = (b_q32 * b_since).to(DOT), (b_k32 * b_until).to(DOT)
            b_part = tl.dot(b_up, tl.trans(b_down), input_precision=PRECISION)
            b_a += tl.where(_pairs(o_t, size), b_part, 0.0)
        b_q = (b_q32 * tl.exp(tl.cumsum(b_g, axis=0))).to(DOT)
    b_a = tl.where(o_t[:, None] >= o_t[None, :], b_a, 0.0).to(DOT)
    b_o = tl.dot(b_q, b_s, input_precision=PRECISION)
    b_o += tl.dot(b_a, b_v.to(DOT), input_precision=PRECISION)
    if AUGMENT:
        b_u = tl.load(u + row + o_t * H, mask=m_t, other=0.0)[:, None]
        b_v32 = b_v.to(tl.float32)
        b_o += _sigmoid(b_u * b_v32, FAST) if INSIDE else _sigmoid(b_u, FAST) * b_v32
    if NORMALIZE:
        b_mean = tl.sum(tl.where(m_v, b_o, 0.0), axis=1) / V
        b_o = tl.where(m_v, b_o - b_mean[:, None], 0.0)
        b_rstd = 1 / tl.sqrt(tl.sum(b_o * b_o, axis=1) / V + eps)
        b_o *= b_rstd[:, None]
        tl.store(rstd + row + o_t * H, b_rstd, mask=m_t)
    tl.store(out + row * V + o_t[:, None] * (H * V) + o_v[None, :], b_o.to(out.dtype.element_ty), mask=m_v)


@triton.jit
def norm_kernel(dy, y, rstd, d_out, rows, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """Gradient of the normalisation: `rstd (dy - mean(dy) - y mean(dy y))` for BR rows of V."""
    o_r, o_v = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BV)
    mask = (o_r < rows)[:, None] & (o_v < V)[None, :]
    offset = o_r[:, None] * V + o_v[None, :]
    b_dy = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
    b_y = tl.load(y + offset, mask=mask, other=0.0).to(tl.float32)
    b_rstd = tl.load(rstd + o_r, mask=o_r < rows, other=0.0)
    b_do = b_dy - (tl.sum(b_dy, axis=1) / V)[:, None] - b_y * (tl.sum(b_dy * b_y, axis=1) / V)[:, None]
    tl.store(d_out + offset, (b_do * b_rstd[:, None]).to(d_out.dtype.element_ty), mask=mask)


@triton.jit
def gradient_kernel(
    q, k, q_tilde, k_tilde, v, gate, half, u, weight, d_out, states, d_states, dq, dk, dv, d_gate, d_weight, chunks,
    scale, tau,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr, EXTREME: tl.constexpr, AUGMENT: tl.constexpr,
    INSIDE: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk from its inputs, the state entering it and the gradient of the state leaving it."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    place = i_c.to(tl.int64) * H + i_h
    if _is_extreme(half, place, K, BK, DECAY, LIMIT) != EXTREME:
        return
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_t = tl.arange(0, BK), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    own = place * (K * V)
    m_t, m_k = (t + o_t) < last, o_k < K
    mask = m_t[:, None] & m_k[None, :]
    o_x = row * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q_tilde + o_x, mask=mask, other=0.0).to(DOT)
    b_k = tl.load(k_tilde + o_x, mask=mask, other=0.0).to(DOT)
    b_end = b_k
    earlier, later = o_t[:, None] >= o_t[None, :], o_t[:, None] <= o_t[None, :]
    b_at = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    if EXTREME:
        _, _, b_g = _key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, 0)
        b_q32, b_k32 = b_q.to(tl.float32), b_k.to(tl.float32)
        b_end = (b_k32 * tl.exp(tl.cumsum(b_g, axis=0, reverse=True) - b_g)).to(DOT)
        b_at = tl.where(o_t[:, None] == o_t[None, :], tl.sum(b_q32 * b_k32, axis=1)[:, None], 0.0)
        for level in range(LEVELS):
            size = BT >> (level + 1)
            b_since, b_until = _halves(b_g, o_t, size)
            b_up, b_down = (b_q32 * b_since).to(DOT), (b_k32 * b_until).to(DOT)
            b_at += tl.where(_pairs(o_t, size), tl.dot(b_down, tl.trans(b_up), input_precision=PRECISION), 0.0)
    b_at = tl.where(later, b_at, 0.0).to(DOT)
    b_du, b_u = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    if AUGMENT:
        b_u += tl.load(u + row + o_t * H, mask=m_t, other=0.0)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = m_t[:, None] & (o_v < V)[None, :]
        o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
        b_do = tl.load(d_out + o_y, mask=m_v, other=0.0)
        o_s = own + o_k[:, None] * V + o_v[None, :]
        b_ds = tl.load(d_states + o_s, mask=m_k[:, None] & (o_v < V)[None, :], other=0.0).to(DOT)
        b_dv = tl.dot(b_at, b_do.to(DOT), input_precision=PRECISION)
        b_dv = tl.dot(b_end, b_ds, b_dv, input_precision=PRECISION)
        if AUGMENT:
            b_v, b_do = tl.load(v + o_y, mask=m_v, other=0.0).to(tl.float32), b_do.to(tl.float32)
            if INSIDE:
                b_r = _sigmoid(b_u[:, None] * b_v, FAST)
                b_slope = b_do * (b_r - b_r * b_r)
                b_dv += b_u[:, None] * b_slope
                b_du += tl.sum(b_slope * b_v, axis=1)
            else:
                b_dv += tl.sigmoid(b_u)[:, None] * b_do
                b_du += tl.sum(b_do * b_v, axis=1) * tl.sigmoid(b_u) * tl.sigmoid(-b_u)
        tl.store(dv + o_y, b_dv.to(dv.dtype.element_ty), mask=m_v)
    b_da, b_dat = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    b_dq, b_dk = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    b_kept = tl.zeros([BK], tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = m_t[:, None] & (o_v < V)[None, :]
        o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
        b_v = tl.load(v + o_y, mask=m_v, other=0.0).to(DOT)
        b_do = tl.load(d_out + o_y, mask=m_v, other=0.0).to(DOT)
        m_s = (o_v < V)[:, None] & m_k[None, :]
        o_s = own + o_v[:, None] + o_k[None, :] * V
        b_s = tl.load(states + o_s, mask=m_s, other=0.0).to(DOT)  # [BV, BK]
        b_ds = tl.load(d_states + o_s, mask=m_s, other=0.0).to(DOT)
        if DECAY != 0:
            b_kept += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=0)
        b_da = tl.dot(b_do, tl.trans(b_v), b_da, input_precision=PRECISION)
        b_dat = tl.dot(b_v, tl.trans(b_do), b_dat, input_precision=PRECISION)
        b_dq = tl.dot(b_do, b_s, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_v, b_ds, b_dk, input_precision=PRECISION)
    b_da, b_dat = tl.where(earlier, b_da, 0.0), tl.where(later, b_dat, 0.0)
    if DECAY == 0:
        b_dq = tl.dot(b_da.to(DOT), b_k, b_dq, input_precision=PRECISION) * scale
        b_dk = tl.dot(b_dat.to(DOT), b_q, b_dk, input_precision=PRECISION)
        tl.store(dq + o_x, b_dq.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + o_x, b_dk.to(dk.dtype.element_ty), mask=mask)
    else:
        b_z, b_key, b_g = _key_and_decay(
            k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, FAST
        )
        b_q32, b_k32 = b_q.to(tl.float32), b_k.to(tl.float32)
        if EXTREME:
            b_total = tl.cumsum(b_g, axis=0)
            b_dq *= tl.exp(b_total)
            b_dk *= tl.exp(tl.cumsum(b_g, axis=0, reverse=True) - b_g)
            b_at_end = b_kept * tl.exp(tl.sum(b_g, axis=0)) + tl.sum(b_k32 * b_dk, axis=0)
            b_same = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_da, 0.0), axis=1)
            b_dq += b_same[:, None] * b_k32
            b_dk += b_same[:, None] * b_q32
            for level in range(LEVELS):
                size = BT >> (level + 1)
                b_since, b_until = _halves(b_g, o_t, size)
                pairs = _pairs(o_t, size)
                b_part, b_down = tl.where(pairs, b_da, 0.0).to(DOT), (b_k32 * b_until).to(DOT)
                b_dq += tl.dot(b_part, b_down, input_precision=PRECISION) * b_since
                b_part, b_up = tl.where(pairs, b_dat, 0.0).to(DOT), (b_q32 * b_since).to(DOT)
                b_dk += tl.dot(b_part, b_up, input_precision=PRECISION) * b_until
            b_dg = _cumsum(b_q32 * b_dq - b_k32 * b_dk, True, BT, FAST, PART) + b_at_end[None, :]
        else:
            b_at_end = b_kept + tl.sum(b_k32 * b_dk, axis=0)
            b_dq = tl.dot(b_da.to(DOT), b_k, b_dq, input_precision=PRECISION)
            b_dk = tl.dot(b_dat.to(DOT), b_q, b_dk, input_precision=PRECISION)
            b_dg = _cumsum(b_q32 * b_dq - b_k32 * b_dk, True, BT, FAST, PART) + b_at_end[None, :]
            b_rest = tl.where((o_t == 0)[:, None], 0.0, b_g)
            b_half = tl.load(half + place * K + o_k, mask=m_k, other=0.0)
            b_offset = _cumsum(b_rest, False, BT, FAST, PART) + b_half[None, :]
            b_dq *= _exp(b_offset, FAST)
            b_dk *= _exp(-b_offset, FAST)
        b_dq *= scale
        if AUGMENT:
            b_w = tl.load(weight + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_query = tl.load(q + o_x, mask=mask, other=0.0).to(tl.float32)
            b_duq = b_du[:, None] * b_query
            tl.store(d_weight + place * K + o_k, tl.sum(b_duq * b_key, axis=0), mask=m_k)
            b_dq += b_du[:, None] * b_key * b_w[None, :]
            b_dk += b_duq * b_w[None, :]
        tl.store(dq + o_x, b_dq.to(dq.dtype.element_ty), mask=mask)
        if DECAY == 3:
            b_dz = (b_dg - (1 - b_key) * b_dk) * _sigmoid(-b_z, FAST) * (1 / tau)
            tl.store(d_gate + o_x, b_dz.to(d_gate.dtype.element_ty), mask=mask)
        else:
            tl.store(dk + o_x, b_dk.to(dk.dtype.element_ty), mask=mask)
            if DECAY == 2:
                tl.store(d_gate + o_x, b_dg.to(d_gate.dtype.element_ty), mask=mask)
            if DECAY == 1:
                b_sum = tl.sum(tl.where(m_k[None, :], b_dg, 0.0), axis=1)
                tl.store(d_gate + row + o_t * H, b_sum.to(d_gate.dtype.element_ty), mask=m_t)
