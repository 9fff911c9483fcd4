"""Triton kernels of dilated attention that read the rows of a pattern in place, r·H·D numbers apart.

One program takes a block of the rows that one head has in one segment. A pattern is added to what those before it gave:
no two programs of a launch share a row, so every sum is formed in one order. Exponents are to the base 2.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _block(table, offsets, dilation, B: tl.constexpr):
    """First token of the head's rows in this program's segment, their number, and the first row of the block."""
    entry = table + tl.program_id(0) * 3
    offset = tl.load(offsets + tl.program_id(1))
    width = tl.load(entry + 1)
    rows = (tl.maximum(width - offset, 0) + dilation - 1) // dilation
    return tl.load(entry) + offset, rows.to(tl.int32), tl.load(entry + 2).to(tl.int32) * B


@triton.jit
def _places(token, row, dilation, H, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr):
    """Where rows `row` to `row + B` of this program's head lie in `[N, H, D]`, `[B, BD]`."""
    tokens = token + (row + tl.arange(0, B)).to(tl.int64) * dilation
    return (tokens * H + tl.program_id(1))[:, None] * D + tl.arange(0, BD)[None, :]


@triton.jit
def _load(x, places, rows_left, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr):
    fits = (tl.arange(0, B) < rows_left)[:, None] & (tl.arange(0, BD) < D)[None, :]
    return tl.load(x + places, mask=fits, other=0.0)


@triton.jit
def _scored(scores, line, ahead, seen, scale, reach, BIAS: tl.constexpr):
    """Scores to the base 2 from products, with the bias of keys so many rows ahead; −∞ where a key is not seen."""
    scores = scores * (scale * LOG2E)
    if BIAS:
        begin = line + tl.program_id(1).to(tl.int64) * (2 * reach - 1) + reach - 1
        scores += tl.load(begin + ahead, mask=seen, other=0.0).to(tl.float32) * LOG2E
    return tl.where(seen, scores, LOWEST)


@triton.jit(do_not_specialize=["tokens", "dilation", "reach", "H"])
def attend_kernel(
    q, k, v, line, out, total, table, offsets, tokens, dilation, reach, H, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Takes a pattern's attention into `out` `[N, H, V]` and the log-sum-exps `total` `[H, N]`.

    `EXACT` multiplies what rounding has cut from the shares as well.
    """
    token, rows, first = _block(table, offsets, dilation, BM)
    if first >= rows:
        return
    m = first + tl.arange(0, BM)
    queries = _load(q, _places(token, first, dilation, H, K, BK, BM), rows - first, K, BK, BM)
    acc = tl.zeros((BM, BV), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), LOWEST, tl.float32)
    end = tl.minimum(first + BM, rows) if CAUSAL else rows
    for start in range(0, end, BN):
        n = start + tl.arange(0, BN)
        keys = _load(k, _places(token, start, dilation, H, K, BK, BN), rows - start, K, BK, BN)
        values = _load(v, _places(token, start, dilation, H, V, BV, BN), rows - start, V, BV, BN)
        seen = (m < rows)[:, None] & (n < rows)[None, :]
        ahead = n[None, :] - m[:, None]
        if CAUSAL:
            seen &= ahead <= 0
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = _scored(scores, line, ahead, seen, scale, reach, BIAS)
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == LOWEST, 0.0, higher)
        shares = tl.exp2(scores - finite[:, None])
        old = tl.exp2(top - finite)
        weight = weight * old + tl.sum(shares, 1)
        rounded = shares.to(values.dtype)
        acc = acc * old[:, None] + tl.dot(rounded, values, input_precision=PRECISION)
        if EXACT:
            acc += tl.dot((shares - rounded.to(tl.float32)).to(values.dtype), values, input_precision=PRECISION)
        top = higher
    real = m < rows
    totals = total + tl.program_id(1).to(tl.int64) * tokens + token + m.to(tl.int64) * dilation
    before = tl.load(totals, mask=real, other=LOWEST) * LOG2E
    higher = tl.maximum(top, before)
    finite = tl.where(higher == LOWEST, 0.0, higher)
    old, new = tl.exp2(before - finite), tl.exp2(top - finite)
    joined = old + weight * new
    joined = tl.where(joined == 0.0, 1.0, joined)
    places = _places(token, first, dilation, H, V, BV, BM)
    fits = real[:, None] & (tl.arange(0, BV) < V)[None, :]
    given = tl.load(out + places, mask=fits, other=0.0).to(tl.float32)
    result = given * (old / joined)[:, None] + acc * (new / joined)[:, None]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=fits)
    tl.store(totals, tl.where(higher == LOWEST, LOWEST, (finite + tl.log2(joined)) / LOG2E), mask=real)


@triton.jit
def _add(x, places, value, rows_left, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr):
    fits = (tl.arange(0, B) < rows_left)[:, None] & (tl.arange(0, BD) < D)[None, :]
    before = tl.load(x + places, mask=fits, other=0.0).to(tl.float32)
    tl.store(x + places, (before + value).to(x.dtype.element_ty), mask=fits)


@triton.jit
def _total(totals, place, real):
    """Log-sum-exps to the base 2, finite also for a row that sees no key."""
    total = tl.load(totals + place, mask=real, other=0.0) * LOG2E
    return tl.where(total == LOWEST, 0.0, total)


@triton.jit(do_not_specialize=["tokens", "dilation", "reach", "H"])
def query_gradient_kernel(
    grad, q, k, v, out, line, total, delta, dq, table, offsets, tokens, dilation, reach, H, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a pattern's share to `dq`, and writes the products `delta` `[H, N]` of output and gradient of its rows."""
    token, rows, first = _block(table, offsets, dilation, BM)
    if first >= rows:
        return
    m = first + tl.arange(0, BM)
    real = m < rows
    queries = _load(q, _places(token, first, dilation, H, K, BK, BM), rows - first, K, BK, BM)
    places = _places(token, first, dilation, H, V, BV, BM)
    given = _load(grad, places, rows - first, V, BV, BM)
    result = _load(out, places, rows - first, V, BV, BM)
    product = tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)
    place = tl.program_id(1).to(tl.int64) * tokens + token + m.to(tl.int64) * dilation
    tl.store(delta + place, product, mask=real)
    totals = _total(total, place, real)
    acc = tl.zeros((BM, BK), tl.float32)
    end = tl.minimum(first + BM, rows) if CAUSAL else rows
    for start in range(0, end, BN):
        n = start + tl.arange(0, BN)
        keys = _load(k, _places(token, start, dilation, H, K, BK, BN), rows - start, K, BK, BN)
        values = _load(v, _places(token, start, dilation, H, V, BV, BN), rows - start, V, BV, BN)
        seen = real[:, None] & (n < rows)[None, :]
        ahead = n[None, :] - m[:, None]
        if CAUSAL:
            seen &= ahead <= 0
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        shares = tl.exp2(_scored(scores, line, ahead, seen, scale, reach, BIAS) - totals[:, None])
        slopes = tl.dot(given, tl.trans(values), input_precision=PRECISION) - product[:, None]
        acc += tl.dot((shares * slopes).to(keys.dtype), keys, input_precision=PRECISION)
    _add(dq, _places(token, first, dilation, H, K, BK, BM), acc * scale, rows - first, K, BK, BM)


@triton.jit(do_not_specialize=["tokens", "dilation", "reach", "H"])
def key_gradient_kernel(
    grad, q, k, v, line, total, delta, dk, dv, table, offsets, tokens, dilation, reach, H, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a pattern's shares to `dk` and `dv`; BM keys a program, products transposed from the start."""
    token, rows, first = _block(table, offsets, dilation, BM)
    if first >= rows:
        return
    n = first + tl.arange(0, BM)
    keys = _load(k, _places(token, first, dilation, H, K, BK, BM), rows - first, K, BK, BM)
    values = _load(v, _places(token, first, dilation, H, V, BV, BM), rows - first, V, BV, BM)
    key_sum = tl.zeros((BM, BK), tl.float32)
    value_sum = tl.zeros((BM, BV), tl.float32)
    begin = first // BN * BN if CAUSAL else 0
    for start in range(begin, rows, BN):
        m = start + tl.arange(0, BN)
        queries = _load(q, _places(token, start, dilation, H, K, BK, BN), rows - start, K, BK, BN)
        given = _load(grad, _places(token, start, dilation, H, V, BV, BN), rows - start, V, BV, BN)
        place = tl.program_id(1).to(tl.int64) * tokens + token + m.to(tl.int64) * dilation
        totals = _total(total, place, m < rows)
        product = tl.load(delta + place, mask=m < rows, other=0.0)
        seen = (n < rows)[:, None] & (m < rows)[None, :]
        ahead = n[:, None] - m[None, :]
        if CAUSAL:
            seen &= ahead <= 0
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        shares = tl.exp2(_scored(scores, line, ahead, seen, scale, reach, BIAS) - totals[None, :])
        value_sum += tl.dot(shares.to(given.dtype), given, input_precision=PRECISION)
        slopes = tl.dot(values, tl.trans(given), input_precision=PRECISION) - product[None, :]
        key_sum += tl.dot((shares * slopes).to(queries.dtype), queries, input_precision=PRECISION)
    _add(dk, _places(token, first, dilation, H, K, BK, BM), key_sum * scale, rows - first, K, BK, BM)
    _add(dv, _places(token, first, dilation, H, V, BV, BM), value_sum, rows - first, V, BV, BM)


@triton.jit(do_not_specialize=["count", "lowest", "tokens", "dilation", "reach", "H"])
def bias_gradient_kernel(
    grad, q, k, v, line, total, delta, sums, table, offsets, count, lowest, tokens, dilation, reach, H, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the scores' gradients over blocks equally far from the diagonal, `[H, distances, parts, BM, BM]`.

    Axis 2 tells the distance of the keys' block from the queries', from `lowest` on, axis 0 which of the `count` blocks
    of queries a program takes: every so many.
    """
    apart = tl.program_id(2) + lowest
    lane = tl.arange(0, BM)
    offset = tl.load(offsets + tl.program_id(1))
    acc = tl.zeros((BM, BM), tl.float32)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        entry = table + index * 3
        width = tl.load(entry + 1)
        rows = ((tl.maximum(width - offset, 0) + dilation - 1) // dilation).to(tl.int32)
        token, first = tl.load(entry) + offset, tl.load(entry + 2).to(tl.int32) * BM
        start = first + apart * BM
        if (first < rows) & (start >= 0) & (start < rows):
            m, n = first + lane, start + lane
            queries = _load(q, _places(token, first, dilation, H, K, BK, BM), rows - first, K, BK, BM)
            given = _load(grad, _places(token, first, dilation, H, V, BV, BM), rows - first, V, BV, BM)
            keys = _load(k, _places(token, start, dilation, H, K, BK, BM), rows - start, K, BK, BM)
            values = _load(v, _places(token, start, dilation, H, V, BV, BM), rows - start, V, BV, BM)
            place = tl.program_id(1).to(tl.int64) * tokens + token + m.to(tl.int64) * dilation
            totals = _total(total, place, m < rows)
            product = tl.load(delta + place, mask=m < rows, other=0.0)
            seen = (m < rows)[:, None] & (n < rows)[None, :]
            ahead = n[None, :] - m[:, None]
            if CAUSAL:
                seen &= ahead <= 0
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            shares = tl.exp2(_scored(scores, line, ahead, seen, scale, reach, True) - totals[:, None])
            slopes = tl.dot(given, tl.trans(values), input_precision=PRECISION) - product[:, None]
            acc += shares * slopes
    program = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + program.to(tl.int64) * BM * BM + lane[:, None] * BM + lane[None, :], acc)
