"""Triton kernels of gated linear attention and MetaLA.

The work of one call, forward: `state_kernel` (what each segment adds), `scan_kernel` (the state entering each segment),
`state_kernel` again (the state entering each chunk), `output_kernel` (one program per chunk). Backward: `norm_kernel`
(MetaLA alone), the state kernels in reverse, which give the gradient of the state leaving each chunk, and
`gradient_kernel`. A segment is a few hundred tokens, so that the time depends on the number of tokens only.

Conventions: tensors are contiguous `[N, H, K]` over all tokens of all sequences; tables of int32 say where segments and
chunks lie, which serves batches and packed documents alike. `i_` program index, `o_` offsets, `m_` mask, `b_` block in
registers, `p_` pointer. `DECAY` is 0 for none, 1 for one number per head, 2 for one per channel, 3 for gate logits that
give both the decay and the key. `DOT` is the dtype of matrix operands, accumulation is float32.

Exponents: state kernels only use sums of log decays that lie between two rows, so all are <= 0. Inside a chunk one
factorisation about the centre serves while half of the chunk's range is at most `LIMIT`; otherwise the rows of second
halves meet the columns of first halves, for halves of 32, 16, ..., 1 rows, again with exponents <= 0. Entries above
the diagonal may be infinite: they are selected away, never multiplied by a mask. Products are transposed by exchanging
their operands, never by transposing a result.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _gate(z, tau):
    """`a = logsigmoid(z) / tau` and `1 - exp(a)`, both with small relative error near 0."""
    x = tl.exp(-tl.abs(z))
    log = tl.where(x < 0.01, x * (1 - x * (0.5 - x * (1.0 / 3))), tl.log(1 + x))
    a = (tl.minimum(z, 0.0) - log) / tau
    series = -a * (1 + a * (0.5 + a * (1.0 / 6 + a * (1.0 / 24))))
    return a, tl.where(a > -0.05, series, 1 - tl.exp(a))


@triton.jit
def _key_and_decay(
    k, gate, row, o_rows, o_columns, m_rows, mask, tau, H: tl.constexpr, K: tl.constexpr, DECAY: tl.constexpr
):
    """Key and log decay of a tile, in float32; rows outside the sequence write nothing and decay by 1."""
    offset = row * K + o_rows * (H * K) + o_columns
    if DECAY == 3:
        z = tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)
        b_g, b_k = _gate(z, tau)
        b_g, b_k = tl.where(mask, b_g, 0.0), tl.where(mask, b_k, 0.0)
    else:
        z = tl.zeros(mask.shape, tl.float32)
        b_k = tl.load(k + offset, mask=mask, other=0.0).to(tl.float32)
        if DECAY == 2:
            b_g = tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)
        elif DECAY == 1:
            b_g = z + tl.load(gate + row + o_rows * H, mask=m_rows, other=0.0).to(tl.float32)
        else:
            b_g = z
        b_g = tl.maximum(b_g, -1e4)
    return z, b_k, b_g


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
def state_kernel(
    x, y, gate, start, end, lost, states, segments, scale, tau,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr, STORE_STATES: tl.constexpr,
    STORE_END: tl.constexpr, STORE_LOST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks a segment: forward with x = k, y = v for the states, in reverse with x = q, y = do for their gradients."""
    i_s, i_h, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, chunk = tl.load(segments + 3 * i_s), tl.load(segments + 3 * i_s + 1), tl.load(segments + 3 * i_s + 2)
    count = tl.cdiv(last - first, BT)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    o_s = o_k[:, None] * V + o_v[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
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
        mask = (o_k < K)[:, None] & m_t[None, :]
        m_y = m_t[:, None] & (o_v < V)[None, :]
        b_y = tl.load(y + row * V + o_t[:, None] * (H * V) + o_v[None, :], mask=m_y, other=0.0)
        if REVERSE:
            _, _, b_g = _key_and_decay(x, gate, row, o_t[None, :], o_k[:, None], m_t[None, :], mask, tau, H, K, DECAY)
            b_x = (
                tl.load(x + row * K + o_t[None, :] * (H * K) + o_k[:, None], mask=mask, other=0.0).to(tl.float32)
                * scale
            )
        else:
            _, b_x, b_g = _key_and_decay(x, gate, row, o_t[None, :], o_k[:, None], m_t[None, :], mask, tau, H, K, DECAY)
        if STORE_STATES:
            p_states = states + ((chunk + c).to(tl.int64) * H + i_h) * (K * V) + o_s
            tl.store(p_states, b_s.to(states.dtype.element_ty), mask=m_s)
        if DECAY != 0:
            b_all = tl.sum(b_g, axis=1)
            b_lost += b_all
            b_s *= tl.exp(b_all)[:, None]
            if REVERSE:
                b_x *= tl.exp(tl.cumsum(b_g, axis=1))
            else:
                b_x *= tl.exp(tl.cumsum(b_g, axis=1, reverse=True) - b_g)
        b_s += tl.dot(b_x.to(DOT), b_y.to(DOT), input_precision=PRECISION)
    if STORE_END:
        tl.store(end + own + o_s, b_s, mask=m_s)
    if STORE_LOST:
        tl.store(lost + (i_s.to(tl.int64) * H + i_h) * K + o_k, b_lost, mask=o_k < K)


@triton.jit
def _then(a_lost, a, b_lost, b):
    return a_lost + b_lost, tl.exp(b_lost) * a + b


@triton.jit
def scan_kernel(
    added, lost, initial, start, final, offsets,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state entering every segment of a sequence from what the segments add, BS segments at a time."""
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
    o_n, o_s = i_b * BN + tl.arange(0, BN), tl.arange(0, BS)
    m_n = o_n < K * V
    own = (i_n.to(tl.int64) * H + i_h) * (K * V)
    b_state = tl.load(initial + own + o_n, mask=m_n, other=0.0).to(tl.float32)
    for begin in range(first, last, BS):
        place = begin + o_s
        index = first + last - 1 - place if REVERSE else place
        inside = place < last
        mask = inside[:, None] & m_n[None, :]
        base = index.to(tl.int64) * H + i_h
        b_added = tl.load(added + base[:, None] * (K * V) + o_n[None, :], mask=mask, other=0.0)
        b_lost = tl.load(lost + base[:, None] * K + (o_n // V)[None, :], mask=mask, other=0.0)
        b_lost, b_added = tl.associative_scan((b_lost, b_added), 0, _then)
        b_after = tl.exp(b_lost) * b_state[None, :] + b_added
        is_first = (o_s == 0)[:, None]
        p_first = start + base[:, None] * (K * V) + o_n[None, :]
        tl.store(p_first, b_after * 0 + b_state[None, :], mask=mask & is_first)
        follows = (index - 1 if REVERSE else index + 1).to(tl.int64) * H + i_h
        more = (place + 1 < last) & (o_s + 1 < BS)
        tl.store(start + follows[:, None] * (K * V) + o_n[None, :], b_after, mask=mask & more[:, None])
        b_state = tl.sum(tl.where((o_s == BS - 1)[:, None], b_after, 0.0), axis=0)
    tl.store(final + own + o_n, b_state, mask=m_n)


@triton.jit
def output_kernel(
    q, k, v, gate, weight, states, out, rstd, chunks, scale, tau, eps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr, AUGMENT: tl.constexpr, INSIDE: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`o = scale (q e^G) S + tril(scores) v` of one chunk, with MetaLA's augmentation and norm when asked for."""
    i_c, i_h, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    m_t = (t + o_t) < last
    mask = m_t[:, None] & (o_k < K)[None, :]
    m_v = m_t[:, None] & (o_v < V)[None, :]
    b_q = tl.load(q + row * K + o_t[:, None] * (H * K) + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    _, b_k, b_g = _key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY)
    b_v = tl.load(v + row * V + o_t[:, None] * (H * V) + o_v[None, :], mask=m_v, other=0.0)
    p_s = states + (i_c.to(tl.int64) * H + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = tl.load(p_s, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
    b_scaled = b_q * scale
    causal = o_t[:, None] >= o_t[None, :]
    if DECAY == 0:
        b_a = tl.dot(b_scaled.to(DOT), tl.trans(b_k.to(DOT)), input_precision=PRECISION)
        b_from_start = b_scaled
    else:
        b_total = tl.cumsum(b_g, axis=0)
        b_from_start = b_scaled * tl.exp(b_total)
        b_first = tl.sum(tl.where((o_t == 0)[:, None], b_g, 0.0), axis=0)
        b_last = tl.sum(b_g, axis=0)
        if tl.max(b_first - b_last, axis=0) <= 2 * LIMIT:
            b_offset = b_total - ((b_first + b_last) * 0.5)[None, :]
            b_up, b_down = (b_scaled * tl.exp(b_offset)).to(DOT), (b_k * tl.exp(-b_offset)).to(DOT)
            b_a = tl.dot(b_up, tl.trans(b_down), input_precision=PRECISION)
        else:
            b_a = tl.where(o_t[:, None] == o_t[None, :], tl.sum(b_scaled * b_k, axis=1)[:, None], 0.0)
            for level in range(LEVELS):
                size = BT >> (level + 1)
                b_up, b_down = _halves(b_g, o_t, size)
                b_part = tl.dot((b_scaled * b_up).to(DOT), tl.trans((b_k * b_down).to(DOT)), input_precision=PRECISION)
                b_a += tl.where(_pairs(o_t, size), b_part, 0.0)
    b_a = tl.where(causal, b_a, 0.0).to(DOT)
    b_o = tl.dot(b_from_start.to(DOT), b_s.to(DOT), input_precision=PRECISION)
    b_o += tl.dot(b_a, b_v.to(DOT), input_precision=PRECISION)
    if AUGMENT:
        b_w = tl.load(weight + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_u = tl.sum(b_q * b_k * b_w[None, :], axis=1)[:, None]
        b_o += tl.sigmoid(b_u * b_v.to(tl.float32)) if INSIDE else tl.sigmoid(b_u) * b_v.to(tl.float32)
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
    q, k, v, gate, weight, d_out, states, d_states, dq, dk, dv, d_gate, d_weight, chunks, scale, tau,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr, AUGMENT: tl.constexpr, INSIDE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk from its inputs, the state entering it and the gradient of the state leaving it."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    t, last = tl.load(chunks + 2 * i_c), tl.load(chunks + 2 * i_c + 1)
    o_k, o_t = tl.arange(0, BK), tl.arange(0, BT)
    row = t.to(tl.int64) * H + i_h
    own = (i_c.to(tl.int64) * H + i_h) * (K * V)
    m_t = (t + o_t) < last
    mask = m_t[:, None] & (o_k < K)[None, :]
    o_x = o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q + row * K + o_x, mask=mask, other=0.0).to(tl.float32)
    b_z, b_k, b_g = _key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY)
    b_scaled = b_q * scale
    later = o_t[:, None] <= o_t[None, :]
    moderate = True
    b_to_end = b_k
    if DECAY == 0:
        b_up, b_down = b_scaled.to(DOT), b_k.to(DOT)
        b_at = tl.dot(b_down, tl.trans(b_up), input_precision=PRECISION)
    else:
        b_total = tl.cumsum(b_g, axis=0)
        b_to_end = b_k * tl.exp(tl.cumsum(b_g, axis=0, reverse=True) - b_g)
        b_first = tl.sum(tl.where((o_t == 0)[:, None], b_g, 0.0), axis=0)
        b_last = tl.sum(b_g, axis=0)
        moderate = tl.max(b_first - b_last, axis=0) <= 2 * LIMIT
        b_offset = b_total - ((b_first + b_last) * 0.5)[None, :]
        if moderate:
            b_up, b_down = (b_scaled * tl.exp(b_offset)).to(DOT), (b_k * tl.exp(-b_offset)).to(DOT)
            b_at = tl.dot(b_down, tl.trans(b_up), input_precision=PRECISION)
        else:
            b_at = tl.where(o_t[:, None] == o_t[None, :], tl.sum(b_scaled * b_k, axis=1)[:, None], 0.0)
            for level in range(LEVELS):
                size = BT >> (level + 1)
                b_since, b_until = _halves(b_g, o_t, size)
                b_part = tl.dot(
                    (b_k * b_until).to(DOT), tl.trans((b_scaled * b_since).to(DOT)), input_precision=PRECISION
                )
                b_at += tl.where(_pairs(o_t, size), b_part, 0.0)
    b_at = tl.where(later, b_at, 0.0).to(DOT)
    b_to_end = b_to_end.to(DOT)
    b_u = tl.zeros([BT], tl.float32)
    if AUGMENT:
        b_w = tl.load(weight + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_u = tl.sum(b_q * b_k * b_w[None, :], axis=1)
    b_da, b_dat = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    b_dq, b_dk = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    b_kept, b_du, b_same = tl.zeros([BK], tl.float32), tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = m_t[:, None] & (o_v < V)[None, :]
        o_y = o_t[:, None] * (H * V) + o_v[None, :]
        b_v = tl.load(v + row * V + o_y, mask=m_v, other=0.0)
        b_do = tl.load(d_out + row * V + o_y, mask=m_v, other=0.0)
        m_s = (o_v < V)[:, None] & (o_k < K)[None, :]
        o_s = own + o_v[:, None] + o_k[None, :] * V
        b_s = tl.load(states + o_s, mask=m_s, other=0.0)  # [BV, BK]
        b_ds = tl.load(d_states + o_s, mask=m_s, other=0.0)
        b_kept += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=0)
        b_v32, b_do32 = b_v.to(tl.float32), b_do.to(tl.float32)
        b_same += tl.sum(b_v32 * b_do32, axis=1)
        b_v, b_do, b_s, b_ds = b_v.to(DOT), b_do.to(DOT), b_s.to(DOT), b_ds.to(DOT)
        b_da += tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_dat += tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_dq += tl.dot(b_do, b_s, input_precision=PRECISION)
        b_dk += tl.dot(b_v, b_ds, input_precision=PRECISION)
        b_dv = tl.dot(b_at, b_do, input_precision=PRECISION)
        b_dv += tl.dot(b_to_end, tl.trans(b_ds), input_precision=PRECISION)
        if AUGMENT:
            if INSIDE:
                b_r = tl.sigmoid(b_u[:, None] * b_v32)
                b_slope = b_do32 * b_r * (1 - b_r)
                b_dv += b_u[:, None] * b_slope
                b_du += tl.sum(b_slope * b_v32, axis=1)
            else:
                b_dv += tl.sigmoid(b_u)[:, None] * b_do32
                b_du += tl.sum(b_do32 * b_v32, axis=1) * tl.sigmoid(b_u) * tl.sigmoid(-b_u)
        tl.store(dv + row * V + o_y, b_dv.to(dv.dtype.element_ty), mask=m_v)
    # Read again rather than held in registers through the loop.
    b_q = tl.load(q + row * K + o_x, mask=mask, other=0.0).to(tl.float32)
    b_z, b_k, b_g = _key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY)
    b_scaled = b_q * scale
    b_da = tl.where(o_t[:, None] >= o_t[None, :], b_da, 0.0)
    b_dat = tl.where(later, b_dat, 0.0)
    b_end = b_kept
    if DECAY == 0:
        b_dq += tl.dot(b_da.to(DOT), b_k.to(DOT), input_precision=PRECISION)
        b_dk += tl.dot(b_dat.to(DOT), b_scaled.to(DOT), input_precision=PRECISION)
    else:
        b_total = tl.cumsum(b_g, axis=0)
        b_offset = b_total - ((b_first + b_last) * 0.5)[None, :]
        b_dq *= tl.exp(b_total)
        b_dk *= tl.exp(tl.cumsum(b_g, axis=0, reverse=True) - b_g)
        b_end = b_kept * tl.exp(b_last) + tl.sum(b_k * b_dk, axis=0)
        if moderate:
            b_up, b_down = tl.exp(b_offset), tl.exp(-b_offset)
            b_dq += tl.dot(b_da.to(DOT), (b_k * b_down).to(DOT), input_precision=PRECISION) * b_up
            b_dk += tl.dot(b_dat.to(DOT), (b_scaled * b_up).to(DOT), input_precision=PRECISION) * b_down
        else:
            b_dq += b_same[:, None] * b_k
            b_dk += b_same[:, None] * b_scaled
            for level in range(LEVELS):
                size = BT >> (level + 1)
                b_since, b_until = _halves(b_g, o_t, size)
                pairs = _pairs(o_t, size)
                b_part, b_key = tl.where(pairs, b_da, 0.0).to(DOT), (b_k * b_until).to(DOT)
                b_dq += tl.dot(b_part, b_key, input_precision=PRECISION) * b_since
                b_part, b_query = tl.where(pairs, b_dat, 0.0).to(DOT), (b_scaled * b_since).to(DOT)
                b_dk += tl.dot(b_part, b_query, input_precision=PRECISION) * b_until
    if DECAY != 0:
        b_dg = tl.cumsum(b_scaled * b_dq - b_k * b_dk, axis=0, reverse=True) + b_end[None, :]
    b_dq *= scale
    if AUGMENT:
        b_dq += b_du[:, None] * b_k * b_w[None, :]
        b_dk += b_du[:, None] * b_q * b_w[None, :]
        p_dw = d_weight + (i_c.to(tl.int64) * H + i_h) * K + o_k
        tl.store(p_dw, tl.sum(b_du[:, None] * b_q * b_k, axis=0), mask=o_k < K)
    tl.store(dq + row * K + o_x, b_dq.to(dq.dtype.element_ty), mask=mask)
    if DECAY == 3:
        b_dz = (b_dg - tl.exp(b_g) * b_dk) * tl.sigmoid(-b_z) / tau
        tl.store(d_gate + row * K + o_x, b_dz.to(d_gate.dtype.element_ty), mask=mask)
    else:
        tl.store(dk + row * K + o_x, b_dk.to(dk.dtype.element_ty), mask=mask)
        if DECAY == 2:
            tl.store(d_gate + row * K + o_x, b_dg.to(d_gate.dtype.element_ty), mask=mask)
        if DECAY == 1:
            b_sum = tl.sum(tl.where((o_k < K)[None, :], b_dg, 0.0), axis=1)
            tl.store(d_gate + row + o_t * H, b_sum.to(d_gate.dtype.element_ty), mask=m_t)
