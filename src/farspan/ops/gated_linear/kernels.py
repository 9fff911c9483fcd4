"""Triton kernels of gated linear attention and MetaLA.

Forward: `prepare_kernel` brings decay and scale into queries and keys, `state_kernel` gives what each segment adds,
`scan_kernel` the state entering each segment, `state_kernel` again the state entering each chunk; then `output_kernel`
(in `chunk_kernels`, as those that follow). Backward: `row_kernel` (MetaLA alone), the state kernels in reverse, which
give the gradients of values and of the state leaving each chunk, and `gradient_kernel`. A segment is some hundred
tokens or more, so that the time depends on the number of tokens only.

Conventions: tensors are contiguous `[N, H, K]` over all tokens of all sequences; tables of int32 say where segments and
chunks lie, which serves batches and packed documents alike. `i_` program index, `o_` offsets, `m_` mask, `b_` block in
registers, `p_` pointer. `DECAY` is 0 for none, 1 for one number per head, 2 for one per channel, 3 for gate logits that
give both the decay and the key. `DOT` is the dtype of matrix operands, accumulation is float32. `FAST` allows errors
far below 16 bits: sums of decays by products with a triangle of ones, in two parts of `PART`, and with `FAST` = 2 the
hardware's exponential, logarithm and reciprocal, which the interpreter does not know. With float32 inputs sums of
decays, centres and half ranges are float64: what rounding takes from an exponent of 40 is ten of float32's last places.

Decays of a chunk: with G the inclusive sum of log decays, m = (G_first + G_last) / 2 its centre and h half of its range
(both stored for every chunk and channel), queries are kept as `q~ = scale q e^(G - m)`, keys as `k~ = k e^(m - G)`, the
state entering the chunk as `S~ = e^m S` and the gradient of the state leaving it as `dS~ = e^-h dS`. Then

    o = tril(q~ k~^T) v + q~ S~,    S_next = e^(m - h) S + e^-h k~^T v,    dS_before = e^(m - h) dS + e^m q~^T do
    dq~ = tril(do v^T) k~ + do S~^T,    dk~ = tril(do v^T)^T q~ + v dS~^T,    dv = tril(q~ k~^T)^T do + k~ dS~
    dg_t = sum_{s >= t} (q~ dq~ - k~ dk~)_s + rowsum(S~ dS~) + sum_s k~_s (v dS~^T)_s

at the cost of no decay at all. With one decay per head e^m is the nearest power of 2, which takes no digit from a
state, h is m - G_last, and of the last line the pairs within the chunk are summed by themselves, from what is not
rounded: `scale q k^T e^(G_u - G_s) do v^T` over rows u >= t and columns s < t. Where some h exceeds `LIMIT`, state and
gradient are kept as they are, with `q~ = scale q e^G` and `k~ = k e^(G_last - G)`, and the chunk is left to
`extreme_kernels`. Entries above the diagonal of a product can be infinite: they are selected away, never multiplied by
a mask. Products are transposed by exchanging their operands, never by transposing a result.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Integers compile once for all values.
INTEGERS = ("H", "rows", "count")
# exp of this is 0 in float32; sums of log decays stay small where a decay is 0.
LOG_ZERO = tl.constexpr(-200.0)


@triton.jit
def exp(x, FAST: tl.constexpr):
    if FAST == 2:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2E], dtype=tl.float32, is_pure=True, pack=1
        )
    elif FAST == 1:
        power = tl.exp(x)
    else:  # 2^x of the whole part is exact, so that the error does not grow with the exponent
        bits = x.to(tl.float64) * LOG2E
        whole = tl.floor(tl.maximum(bits, -1000.0))
        power = tl.exp2((bits - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))
    return power


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    if FAST == 2:  # one hardware function instead of two
        return 0.5 + 0.5 * tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.sigmoid(x)


@triton.jit
def prefetch(pointers, FAST: tl.constexpr):
    """Brings what lies at these pointers nearer, for a load that registers leave no room for yet."""
    if FAST == 2:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _gate(z, tau, FAST: tl.constexpr):
    """`a = logsigmoid(z) / tau` and `1 - exp(a)`; unless `FAST`, both with small relative error near 0."""
    x = exp(-tl.abs(z), FAST)
    if FAST == 2:
        log = LN2 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1 + x], dtype=tl.float32, is_pure=True, pack=1
        )
    elif FAST == 1:
        log = tl.log(1 + x)
    else:
        log = tl.where(x < 0.01, x * (1 - x * (0.5 - x * (1.0 / 3))), tl.log(1 + x))
    a = (tl.minimum(z, 0.0) - log) * (1 / tau)
    k = 1 - exp(a, FAST)
    if FAST == 0:
        k = tl.where(a > -0.05, -a * (1 + a * (0.5 + a * (1.0 / 6 + a * (1.0 / 24)))), k)
    return a, k


@triton.jit
def key_and_decay(
    k, gate, row, o_rows, o_columns, m_rows, mask, tau,
    H, K: tl.constexpr, DECAY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gate logit, key and log decay of a tile in float32; rows outside the sequence write nothing and decay by 1."""
    offset = row * K + o_rows * (H * K) + o_columns
    z = tl.zeros(mask.shape, tl.float32)
    if DECAY == 3:
        z = tl.load(gate + offset, mask=mask, other=3e4).to(tl.float32)
        b_g, b_k = _gate(z, tau, FAST)
    else:
        b_k = tl.load(k + offset, mask=mask, other=0.0).to(tl.float32)
        b_g = z
        if DECAY == 2:
            b_g = tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)
        if DECAY == 1:
            b_g = z + tl.load(gate + row + o_rows * H, mask=m_rows, other=0.0).to(tl.float32)
    return z, b_k, tl.maximum(b_g, LOG_ZERO)


@triton.jit
def parts(x, FAST: tl.constexpr, PART: tl.constexpr):
    """Two numbers of `PART` that add up to each of x."""
    if FAST == 2:  # rounded as integers: conversions of single numbers take as long as exponentials
        bits = x.to(tl.uint32, bitcast=True) + 0x8000
        large = (bits >> 16).to(tl.uint16).to(PART, bitcast=True)
        rest = x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        large = x.to(PART)
        rest = x - large.to(tl.float32)
    return large, rest.to(PART)


@triton.jit
def cumsum(
    x, REVERSE: tl.constexpr, BT: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr, OTHERS: tl.constexpr = False
):  # fmt: skip
    """Sums down the rows, or up, of the row itself too unless `OTHERS`."""
    if FAST == 0:
        total = tl.cumsum(x, axis=0, reverse=REVERSE)
        if OTHERS:
            total -= x
    else:
        o_t = tl.arange(0, BT)
        ones = o_t[:, None] <= o_t[None, :] if REVERSE else o_t[:, None] >= o_t[None, :]
        if OTHERS:
            ones &= o_t[:, None] != o_t[None, :]
        large, small = parts(x, FAST, PART)
        total = tl.dot(ones.to(PART), large) + tl.dot(ones.to(PART), small)
    return total


@triton.jit
def after_first(x, BT: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr):
    """Sums down the rows without the first of all."""
    o_t = tl.arange(0, BT)
    if FAST == 0:
        total = tl.cumsum(tl.where((o_t == 0)[:, None], 0.0, x), axis=0)
    else:
        large, small = parts(x, FAST, PART)
        ones = ((o_t[:, None] >= o_t[None, :]) & (o_t > 0)[None, :]).to(PART)
        total = tl.dot(ones, large) + tl.dot(ones, small)
    return total


@triton.jit
def from_product(x, BT: tl.constexpr, FAST: tl.constexpr, PART: tl.constexpr):
    """The same numbers where products leave their results: what gave them is not computed again for that layout."""
    if FAST != 0:
        o_t = tl.arange(0, BT)
        large, small = parts(x, FAST, PART)
        same = (o_t[:, None] == o_t[None, :]).to(PART)
        x = tl.dot(same, large) + tl.dot(same, small)
    return x


@triton.jit
def write_output(
    b_o, b_v, u, out, rstd, row, o_t, o_v, m_t, m_v, eps, H, V: tl.constexpr,
    AUGMENT: tl.constexpr, INSIDE: tl.constexpr, NORMALIZE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Stores one chunk's outputs, after MetaLA's augmentation and norm when asked for."""
    if AUGMENT:
        b_u = tl.load(u + row + o_t * H, mask=m_t, other=0.0)[:, None]
        b_v32 = b_v.to(tl.float32)
        b_o += sigmoid(b_u * b_v32, FAST) if INSIDE else sigmoid(b_u, FAST) * b_v32
    if NORMALIZE:
        b_mean = tl.sum(tl.where(m_v, b_o, 0.0), axis=1) / V
        b_o = tl.where(m_v, b_o - b_mean[:, None], 0.0)
        b_rstd = 1 / tl.sqrt(tl.sum(b_o * b_o, axis=1) / V + eps)
        b_o *= b_rstd[:, None]
        tl.store(rstd + row + o_t * H, b_rstd, mask=m_t)
    tl.store(out + row * V + o_t[:, None] * (H * V) + o_v[None, :], b_o.to(out.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=INTEGERS)
def prepare_kernel(
    q, k, gate, weight, q_tilde, k_tilde, centre, half, u, chunks, scale, tau,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
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
    _, b_k, b_g = key_and_decay(k, gate, row, o_t[:, None], o_k[None, :], m_t[:, None], mask, tau, H, K, DECAY, FAST)
    if DECAY != 0:
        b_g = b_g.to(half.dtype.element_ty)
        # Read again, the first row takes less time than to be found among those of all threads.
        once = tl.zeros([1, 1], tl.int32)
        _, _, b_first = key_and_decay(
            k, gate, row, once, o_k[None, :], once == 0, (o_k < K)[None, :], tau, H, K, DECAY, FAST
        )  # fmt: skip
        b_first = tl.sum(b_first.to(half.dtype.element_ty), axis=0)
        b_half = -0.5 * tl.sum(tl.where((o_t == 0)[:, None], 0.0, b_g), axis=0)
        b_centre, b_start = b_first - b_half, b_half
        if DECAY == 1:  # where nothing is lost, keys stay as they are instead
            b_shift = tl.where(b_half > 0, tl.floor(b_centre * LOG2E + 0.5) * LN2 - b_centre, 0.0)
            b_centre, b_start, b_half = b_centre + b_shift, b_start - b_shift, b_half + b_shift
        p_c = (i_c.to(tl.int64) * H + i_h) * K + o_k
        tl.store(centre + p_c, b_centre, mask=o_k < K)
        tl.store(half + p_c, b_half, mask=o_k < K)
        if DECAY == 3 and FAST != 0:
            b_k = 1 - exp(from_product(b_g, BT, FAST, PART), FAST)
    if AUGMENT:
        b_w = tl.load(weight + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        tl.store(u + row + o_t * H, tl.sum(b_q * b_k * b_w[None, :], axis=1), mask=m_t)
    b_q *= scale
    if DECAY != 0:
        if tl.max(b_half, axis=0) > LIMIT:  # exponents from the chunk's edges, both <= 0
            b_q *= exp(cumsum(b_g, False, BT, FAST, PART), FAST)
            b_k *= exp(cumsum(b_g, True, BT, FAST, PART, True), FAST)
        else:
            b_offset = after_first(b_g, BT, FAST, PART) + b_start[None, :]
            b_q *= exp(b_offset, FAST)
            b_k *= exp(-b_offset, FAST)
    tl.store(q_tilde + row * K + o_x, b_q.to(q_tilde.dtype.element_ty), mask=mask)
    tl.store(k_tilde + row * K + o_x, b_k.to(k_tilde.dtype.element_ty), mask=mask)


@triton.jit
def is_extreme(half, place, K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, LIMIT: tl.constexpr):
    """Whether half of the range of a chunk's decays exceeds the limit in some channel."""
    if DECAY == 0:
        return False
    o_k = tl.arange(0, BK)
    b_half = tl.load(half + place * K + o_k, mask=o_k < K, other=0.0)
    for i in tl.static_range(1, (K + BK - 1) // BK):
        b_half = tl.maximum(b_half, tl.load(half + place * K + i * BK + o_k, mask=i * BK + o_k < K, other=0.0))
    return tl.max(b_half, axis=0) > LIMIT


@triton.jit
def kept_by_walk(kept, place, o_k, K: tl.constexpr, BLOCKS: tl.constexpr):
    """A chunk's `rowsum(S~ dS~)` from the parts that the walk gave for so many blocks of V."""
    b_kept = tl.zeros(o_k.shape, tl.float32)
    for i_v in tl.static_range(BLOCKS):
        b_kept += tl.load(kept + (place * BLOCKS + i_v) * K + o_k, mask=o_k < K, other=0.0)
    return b_kept


@triton.jit(do_not_specialize=INTEGERS)
def state_kernel(
    x, y, centre, half, start, end, lost, states, k_tilde, dv, before, initial, kept, segments,
    H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, LIMIT: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr,
    STORE_STATES: tl.constexpr, STORE_END: tl.constexpr, STORE_LOST: tl.constexpr, STORE_VALUES: tl.constexpr,
    AUGMENT: tl.constexpr, KEPT: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks a segment: forward with x = k~ and y = v for the states, in reverse with q~ and do for their gradients.

    In reverse it can give the gradient of v too, added to that of MetaLA's augmentation where there is one; and where
    `KEPT`, `rowsum(S~ dS~)` of each chunk and block of V, a sequence's first with the state in front of it as given.
    """
    i_s, i_h, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, chunk = tl.load(segments + 4 * i_s), tl.load(segments + 4 * i_s + 1), tl.load(segments + 4 * i_s + 2)
    count = tl.cdiv(last - first, BT)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    o_s = o_k[:, None] * V + o_v[None, :]
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    own = (i_s.to(tl.int64) * H + i_h) * (K * V)
    sequence = tl.load(segments + 4 * i_s + 3)
    b_s = tl.zeros([BK, BV], tl.float32)
    if HAS_START:
        b_s += tl.load(start + own + o_s, mask=m_s, other=0.0).to(tl.float32)
    b_lost = tl.zeros([BK], tl.float32)
    step = -H if REVERSE else H
    place = (chunk + (count - 1 if REVERSE else 0)).to(tl.int64) * H + i_h
    b_m, b_h = tl.zeros([BK], half.dtype.element_ty), tl.zeros([BK], half.dtype.element_ty)
    if DECAY != 0:
        m_c = o_k < tl.where(count > 0, K, 0)
        b_m += tl.load(centre + place * K + o_k, mask=m_c, other=0.0)
        b_h += tl.load(half + place * K + o_k, mask=m_c, other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        t = first + (count - 1 - i if REVERSE else i) * BT
        row = t.to(tl.int64) * H + i_h
        m_t = (t + o_t) < last
        mask = m_k[:, None] & m_t[None, :]
        b_x = tl.load(x + row * K + o_t[None, :] * (H * K) + o_k[:, None], mask=mask, other=0.0)
        p_y = y + row * V + o_t[:, None] * (H * V) + o_v[None, :]
        b_y = tl.load(p_y, mask=m_t[:, None] & m_v[None, :], other=0.0)
        p_states, p_before = states + place * (K * V) + o_s, before + place * (K * V) + o_s
        p_kept = kept + (place * tl.num_programs(2) + i_v) * K + o_k
        place += step
        if DECAY == 0:
            b_now = b_s.to(states.dtype.element_ty)
            b_s += tl.dot(b_x.to(DOT), b_y.to(DOT), input_precision=PRECISION)
        else:
            moderate = tl.max(b_h, axis=0) <= LIMIT
            b_in, b_out = tl.where(moderate, exp(b_m, FAST), 1.0), tl.where(moderate, exp(-b_h, FAST), 1.0)
            b_keep = exp(b_m - b_h, FAST)
            b_lost += (b_m - b_h).to(tl.float32)
            m_c = o_k < tl.where(i + 1 < count, K, 0)  # the next chunk's factors are read while this one's are used
            b_m = tl.load(centre + place * K + o_k, mask=m_c, other=0.0)
            b_h = tl.load(half + place * K + o_k, mask=m_c, other=0.0)
            b_here, b_added = (b_out, b_in) if REVERSE else (b_in, b_out)
            b_now = b_s * b_here[:, None]
            if KEPT:
                b_before = tl.load(p_before, mask=m_s, other=0.0).to(tl.float32)
                if (i + 1 == count) & (sequence >= 0):
                    p_initial = initial + (sequence.to(tl.int64) * H + i_h) * (K * V) + o_s
                    b_before = tl.load(p_initial, mask=m_s, other=0.0).to(tl.float32) * b_in[:, None]
                tl.store(p_kept, tl.sum(b_before * b_now, axis=1), mask=m_k)
            b_now = b_now.to(states.dtype.element_ty)
            b_new = tl.dot(b_x.to(DOT), b_y.to(DOT), input_precision=PRECISION)
            b_s = b_s * b_keep[:, None] + b_new * b_added[:, None]
        if STORE_STATES:
            tl.store(p_states, b_now, mask=m_s)
        if STORE_VALUES:
            o_y = row * V + o_t[:, None] * (H * V) + o_v[None, :]
            m_y = m_t[:, None] & m_v[None, :]
            b_k = tl.load(
                k_tilde + row * K + o_t[:, None] * (H * K) + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0
            )
            b_at = tl.dot(b_k.to(DOT), b_x.to(DOT), input_precision=PRECISION)
            b_at = tl.where(o_t[:, None] <= o_t[None, :], b_at, 0.0).to(DOT)
            b_dv = tl.dot(b_at, b_y.to(DOT), input_precision=PRECISION)
            b_dv = tl.dot(b_k.to(DOT), b_now.to(DOT), b_dv, input_precision=PRECISION)
            if AUGMENT:
                b_dv += tl.load(dv + o_y, mask=m_y, other=0.0).to(tl.float32)
            tl.store(dv + o_y, b_dv.to(dv.dtype.element_ty), mask=m_y)
    if STORE_END:
        tl.store(end + own + o_s, b_s, mask=m_s)
    if STORE_LOST:
        tl.store(lost + (i_s.to(tl.int64) * H + i_h) * K + o_k, b_lost, mask=m_k)


@triton.jit(do_not_specialize=INTEGERS)
def scan_kernel(
    added, lost, initial, start, final, offsets,
    H, K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """The state entering every segment of a sequence from what the segments add."""
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
    o_n = i_b * BN + tl.arange(0, BN)
    m_n = o_n < K * V
    own = (i_n.to(tl.int64) * H + i_h) * (K * V)
    b_s = tl.zeros([BN], tl.float32)
    if HAS_START:
        b_s += tl.load(initial + own + o_n, mask=m_n, other=0.0).to(tl.float32)
    base = (last - 1 if REVERSE else first).to(tl.int64) * H + i_h
    b_added = tl.load(added + base * (K * V) + o_n, mask=m_n, other=0.0)
    b_lost = tl.load(lost + base * K + o_n // V, mask=m_n, other=0.0)
    for i in range(first, last):
        tl.store(start + base * (K * V) + o_n, b_s, mask=m_n)
        b_s = b_s * tl.exp(b_lost) + b_added
        base += -H if REVERSE else H  # the next segment is read while this one is written
        m_next = o_n < tl.where(i + 1 < last, K * V, 0)
        b_added = tl.load(added + base * (K * V) + o_n, mask=m_next, other=0.0)
        b_lost = tl.load(lost + base * K + o_n // V, mask=m_next, other=0.0)
    tl.store(final + own + o_n, b_s, mask=m_n)
