"""Triton kernels of causal top-w attention: each block of C queries meets its live keys in lanes, then its own keys.

The table of lanes names for each block the keys that are alive when it begins; who dies inside it is told by e(j), who
is born inside it stands in the block's own tile. Where keys come back (`LIMITED`: windows, blocks), a row keeps those
of its living keys whose rank reaches its limit. The gradient of queries walks along the lanes of one block. That of
keys walks along the blocks of some lanes, holds 64 keys at a time, and gives a key's sum away when another takes its
lane: every pair is met once, nothing is added atomically.

A gradient of the bias is a sum of differences, d_out·v − delta with delta = d_out·out, and a sum of a thousand of them
shows what rounding takes from the output. A row's gradients of scores sum to 0 with the right delta: what they sum to
is what rounding took, and the gradients of keys and biases, which come last, take delta with it.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(x, row, head, mask, T, H, D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr):
    """Rows `[len(row), BD]` of one batch row of `[T, H, D]`."""
    c = tl.arange(0, BD)
    place = x + (row.to(tl.int64) * H + head)[:, None] * D + c[None, :]
    return tl.load(place, mask=mask[:, None] & (c < D)[None, :], other=0.0).to(DOT)


@triton.jit
def _keys(k, v, bias, expires, j, mask, g, G, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
          DOT: tl.constexpr):  # fmt: skip
    """Keys, values, biases (in bits) and expiries of the keys j; 0 where masked, so that they have expired."""
    b_k = _rows(k, j, g, mask, 0, G, D, BD, DOT)
    b_v = _rows(v, j, g, mask, 0, G, V, BV, DOT)
    b_bias = tl.load(bias + j, mask=mask, other=0.0) * LOG2E
    return b_k, b_v, b_bias, tl.load(expires + j, mask=mask, other=0)


@triton.jit
def _kept(ranks, limit, j, mask):
    """Whether rows of these limits keep the keys j, `[rows, keys]`."""
    return tl.load(ranks + j, mask=mask, other=-1)[None, :] >= limit[:, None]


@triton.jit
def _softmax_step(b_q, b_k, b_v, b_bias, seen, scale, top, weight, acc, DOT: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys of the online softmax; scores in bits."""
    s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + b_bias[None, :]
    s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - finite[:, None])
    shrink = tl.exp2(top - finite)
    weight = weight * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(DOT), b_v, input_precision=PRECISION)
    return higher, weight, acc


@triton.jit
def _group(H, G, U, B, QB: tl.constexpr):
    """Batch row, first query head, unit and key head of a program."""
    groups = H // QB
    batch = tl.program_id(1) // groups
    head = tl.program_id(1) % groups * QB
    unit = head // (H // U)
    return batch.to(tl.int64), head, unit, unit // (U // G)


@triton.jit(do_not_specialize=["B", "T", "S", "H", "G", "U", "blocks", "W", "first_row"])
def attend_kernel(
    q, k, v, bias, expires, ranks, limits, table, out, lse, scale, B, T, S, H, G, U, blocks, W, first_row,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, QB: tl.constexpr,
    BN: tl.constexpr, LIMITED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output `[B, T, H, V]` and log-sum-exp in bits `[B, H, T]` of QB heads of a block."""
    block = tl.program_id(0)
    batch, head, unit, g = _group(H, G, U, B, QB)
    m = tl.arange(0, QB * C)
    row, heads = block * C + m % C, head + m // C
    real = row < T
    b_q = _rows(q + batch * T * H * D, row, heads, real, T, H, D, BD, DOT)
    k += batch * S * G * D
    v += batch * S * G * V
    bias += (batch * U + unit) * S
    expires += (batch * U + unit) * S
    table += ((batch * U + unit) * blocks + block) * W
    place = first_row + row
    if LIMITED:
        ranks += (batch * U + unit) * S
        limit = tl.load(limits + (batch * U + unit) * T + row, mask=real, other=0)
    top = tl.full((QB * C,), float("-inf"), tl.float32)
    weight = tl.zeros((QB * C,), tl.float32)
    acc = tl.zeros((QB * C, BV), tl.float32)
    for start in range(0, tl.minimum(W, first_row + block * C), BN):
        j = tl.load(table + start + tl.arange(0, BN))
        b_k, b_v, b_bias, gone = _keys(k, v, bias, expires, tl.maximum(j, 0), j >= 0, g, G, D, V, BD, BV, DOT)
        seen = place[:, None] < gone[None, :]
        if LIMITED:
            seen = seen & _kept(ranks, limit, tl.maximum(j, 0), j >= 0)
        top, weight, acc = _softmax_step(b_q, b_k, b_v, b_bias, seen, scale, top, weight, acc, DOT, PRECISION)
    j = first_row + block * C + tl.arange(0, C)
    b_k, b_v, b_bias, gone = _keys(k, v, bias, expires, j, j < S, g, G, D, V, BD, BV, DOT)
    seen = (place[:, None] < gone[None, :]) & (place[:, None] >= j[None, :])
    if LIMITED:
        seen = seen & _kept(ranks, limit, j, j < S)
    top, weight, acc = _softmax_step(b_q, b_k, b_v, b_bias, seen, scale, top, weight, acc, DOT, PRECISION)
    empty = weight == 0.0
    acc = acc / tl.where(empty, 1.0, weight)[:, None]
    c = tl.arange(0, BV)
    place = ((batch * T + row) * H + heads)[:, None] * V + c[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=real[:, None] & (c < V)[None, :])
    tl.store(lse + (batch * H + heads) * T + row, top + tl.log2(tl.where(empty, 1.0, weight)), mask=real)


@triton.jit
def _score_gradient(b_q, b_do, b_k, b_v, b_bias, seen, b_lse, delta, scale, TURNED: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of the scores of a tile `[queries, keys]`, float32; `TURNED` forms the products transposed."""
    if TURNED:
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale + b_bias[:, None]
        p = tl.where(tl.trans(seen), tl.exp2(s - b_lse[None, :]), 0.0)
        return tl.trans(p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - delta[None, :]))
    else:
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + b_bias[None, :]
        p = tl.where(seen, tl.exp2(s - b_lse[:, None]), 0.0)
        return p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - delta[:, None])


@triton.jit(do_not_specialize=["B", "T", "S", "H", "G", "U", "blocks", "W", "first_row"])
def query_gradient_kernel(
    q, k, v, bias, expires, ranks, limits, table, out, lse, d_out, dq, delta, scale, plain_scale, B, T, S, H, G,
    U, blocks, W, first_row,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, QB: tl.constexpr,
    BN: tl.constexpr, LIMITED: tl.constexpr, TURNED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta = Σ out·d_out `[B, H, T]` for the gradients of keys; transposed, float32 stays in registers."""
    block = tl.program_id(0)
    batch, head, unit, g = _group(H, G, U, B, QB)
    m = tl.arange(0, QB * C)
    row, heads = block * C + m % C, head + m // C
    real = row < T
    b_q = _rows(q + batch * T * H * D, row, heads, real, T, H, D, BD, DOT)
    b_do = _rows(d_out + batch * T * H * V, row, heads, real, T, H, V, BV, DOT)
    b_out = _rows(out + batch * T * H * V, row, heads, real, T, H, V, BV, tl.float32)
    b_delta = tl.sum(b_out * b_do.to(tl.float32), 1)
    b_lse = tl.load(lse + (batch * H + heads) * T + row, mask=real, other=float("inf"))
    k += batch * S * G * D
    v += batch * S * G * V
    bias += (batch * U + unit) * S
    expires += (batch * U + unit) * S
    table += ((batch * U + unit) * blocks + block) * W
    place = first_row + row
    if LIMITED:
        ranks += (batch * U + unit) * S
        limit = tl.load(limits + (batch * U + unit) * T + row, mask=real, other=0)
    acc = tl.zeros((QB * C, BD), tl.float32)
    b_taken = tl.zeros((QB * C,), tl.float32)
    for start in range(0, tl.minimum(W, first_row + block * C), BN):
        j = tl.load(table + start + tl.arange(0, BN))
        b_k, b_v, b_bias, gone = _keys(k, v, bias, expires, tl.maximum(j, 0), j >= 0, g, G, D, V, BD, BV, DOT)
        seen = place[:, None] < gone[None, :]
        if LIMITED:
            seen = seen & _kept(ranks, limit, tl.maximum(j, 0), j >= 0)
        ds = _score_gradient(b_q, b_do, b_k, b_v, b_bias, seen, b_lse, b_delta, scale, TURNED, PRECISION)
        b_taken += tl.sum(ds, 1)
        acc += tl.dot(ds.to(DOT), b_k, input_precision=PRECISION)
    j = first_row + block * C + tl.arange(0, C)
    b_k, b_v, b_bias, gone = _keys(k, v, bias, expires, j, j < S, g, G, D, V, BD, BV, DOT)
    seen = (place[:, None] < gone[None, :]) & (place[:, None] >= j[None, :])
    if LIMITED:
        seen = seen & _kept(ranks, limit, j, j < S)
    ds = _score_gradient(b_q, b_do, b_k, b_v, b_bias, seen, b_lse, b_delta, scale, TURNED, PRECISION)
    tl.store(delta + (batch * H + heads) * T + row, b_delta + b_taken + tl.sum(ds, 1), mask=real)
    acc += tl.dot(ds.to(DOT), b_k, input_precision=PRECISION)
    c = tl.arange(0, BD)
    p_dq = dq + ((batch * T + row) * H + heads)[:, None] * D + c[None, :]
    tl.store(p_dq, (acc * plain_scale).to(dq.dtype.element_ty), mask=real[:, None] & (c < D)[None, :])


@triton.jit
def _key_step(
    q, d_out, lse, delta, limits, row, heads, j, own, b_k, b_v, b_bias, gone, rank, dk, dv, db, scale, batch, T, H,
    first_row,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, LIMITED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what some rows give to the gradients of a tile of keys; products are formed transposed."""
    real = row < T
    b_q = _rows(q + batch * T * H * D, row, heads, real, T, H, D, BD, DOT)
    b_do = _rows(d_out + batch * T * H * V, row, heads, real, T, H, V, BV, DOT)
    b_lse = tl.load(lse + (batch * H + heads) * T + row, mask=real, other=float("inf"))
    b_delta = tl.load(delta + (batch * H + heads) * T + row, mask=real, other=0.0)
    place = first_row + row
    seen = (gone[:, None] > place[None, :]) & real[None, :]
    if own:
        seen = seen & (j[:, None] <= place[None, :])
    if LIMITED:
        seen = seen & (rank[:, None] >= tl.load(limits + row, mask=real, other=0)[None, :])
    s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale + b_bias[:, None]
    p = tl.where(seen, tl.exp2(s - b_lse[None, :]), 0.0)
    dv += tl.dot(p.to(DOT), b_do, input_precision=PRECISION)
    ds = p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
    dk += tl.dot(ds.to(DOT), b_q, input_precision=PRECISION)
    return dk, dv, db + tl.sum(ds, 1)


@triton.jit(do_not_specialize=["B", "T", "S", "H", "G", "U", "first_row"])
def own_gradient_kernel(
    q, k, v, bias, expires, ranks, limits, lse, delta, d_out, dk, dv, d_bias, scale, plain_scale, B, T, S, H, G, U,
    first_row,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, QB: tl.constexpr,
    LIMITED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's keys from the block's own rows, float32 `[B, S, U, D]`, `[B, S, U, V]`, `[B, U, S]`."""
    block, unit = tl.program_id(0), tl.program_id(1) % U
    batch = (tl.program_id(1) // U).to(tl.int64)
    g = unit // (U // G)
    j = first_row + block * C + tl.arange(0, C)
    bias += (batch * U + unit) * S
    expires += (batch * U + unit) * S
    k += batch * S * G * D
    v += batch * S * G * V
    b_k, b_v, b_bias, gone = _keys(k, v, bias, expires, j, j < S, g, G, D, V, BD, BV, DOT)
    rank = gone
    if LIMITED:
        limits += (batch * U + unit) * T
        rank = tl.load(ranks + (batch * U + unit) * S + j, mask=j < S, other=-1)
    b_dk = tl.zeros((C, BD), tl.float32)
    b_dv = tl.zeros((C, BV), tl.float32)
    db = tl.zeros((C,), tl.float32)
    m = tl.arange(0, QB * C)
    for head in range(unit * (H // U), (unit + 1) * (H // U), QB):
        b_dk, b_dv, db = _key_step(
            q, d_out, lse, delta, limits, block * C + m % C, head + m // C, j, True, b_k, b_v, b_bias, gone, rank,
            b_dk, b_dv, db, scale, batch, T, H, first_row, D, V, BD, BV, LIMITED, DOT, PRECISION,
        )  # fmt: skip
    c, e = tl.arange(0, BD), tl.arange(0, BV)
    key = (batch * S + j) * U + unit
    tl.store(dk + key[:, None] * D + c[None, :], b_dk * plain_scale, mask=(j < S)[:, None] & (c < D)[None, :])
    tl.store(dv + key[:, None] * V + e[None, :], b_dv, mask=(j < S)[:, None] & (e < V)[None, :])
    tl.store(d_bias + (batch * U + unit) * S + j, db, mask=j < S)


@triton.jit
def _give_away(dk, dv, d_bias, key, j, mask, b_dk, b_dv, db, scale, D: tl.constexpr, V: tl.constexpr,
               BD: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Adds sums of lanes to the gradients of the keys that stood there; no other program has these keys."""
    c, e = tl.arange(0, BD), tl.arange(0, BV)
    p_dk, m_dk = dk + key[:, None] * D + c[None, :], mask[:, None] & (c < D)[None, :]
    tl.store(p_dk, tl.load(p_dk, mask=m_dk, other=0.0) + b_dk * scale, mask=m_dk)
    p_dv, m_dv = dv + key[:, None] * V + e[None, :], mask[:, None] & (e < V)[None, :]
    tl.store(p_dv, tl.load(p_dv, mask=m_dv, other=0.0) + b_dv, mask=m_dv)
    tl.store(d_bias + j, tl.load(d_bias + j, mask=mask, other=0.0) + db, mask=mask)


@triton.jit(do_not_specialize=["B", "T", "S", "H", "G", "U", "blocks", "W", "first_row"])
def lane_gradient_kernel(
    q, k, v, bias, expires, ranks, limits, table, lse, delta, d_out, dk, dv, d_bias, scale, plain_scale, B, T, S, H, G,
    U, blocks, W, first_row,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, QB: tl.constexpr,
    BL: tl.constexpr, LIMITED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of keys what the rows of later blocks give, for the keys that pass through some lanes."""
    lane, unit = tl.program_id(0) * BL + tl.arange(0, BL), tl.program_id(1) % U
    batch = (tl.program_id(1) // U).to(tl.int64)
    g = unit // (U // G)
    k += batch * S * G * D
    v += batch * S * G * V
    bias += (batch * U + unit) * S
    expires += (batch * U + unit) * S
    d_bias += (batch * U + unit) * S
    table += (batch * U + unit) * blocks * W
    if LIMITED:
        ranks += (batch * U + unit) * S
        limits += (batch * U + unit) * T
    j = tl.full((BL,), -1, tl.int32)
    b_dk = tl.zeros((BL, BD), tl.float32)
    b_dv = tl.zeros((BL, BV), tl.float32)
    db = tl.zeros((BL,), tl.float32)
    m = tl.arange(0, QB * C)
    # Lanes fill in order: before the first key of these has come, there is nothing to do.
    empty = tl.maximum(tl.program_id(0) * BL - first_row, 0) // C
    table += empty.to(tl.int64) * W
    for block in range(empty, blocks):
        newest = tl.load(table + lane)
        table += W
        changed = newest != j
        if tl.max(changed.to(tl.int32), 0) > 0:
            key = (batch * S + tl.maximum(j, 0)) * U + unit
            _give_away(
                dk, dv, d_bias, key, tl.maximum(j, 0), changed & (j >= 0), b_dk, b_dv, db, plain_scale, D, V, BD, BV
            )
            b_dk = tl.where(changed[:, None], 0.0, b_dk)
            b_dv = tl.where(changed[:, None], 0.0, b_dv)
            db = tl.where(changed, 0.0, db)
            j = newest
        b_k, b_v, b_bias, gone = _keys(k, v, bias, expires, tl.maximum(j, 0), j >= 0, g, G, D, V, BD, BV, DOT)
        rank = gone
        if LIMITED:
            rank = tl.load(ranks + tl.maximum(j, 0), mask=j >= 0, other=-1)
        for head in range(unit * (H // U), (unit + 1) * (H // U), QB):
            b_dk, b_dv, db = _key_step(
                q, d_out, lse, delta, limits, block * C + m % C, head + m // C, j, False, b_k, b_v, b_bias, gone, rank,
                b_dk, b_dv, db, scale, batch, T, H, first_row, D, V, BD, BV, LIMITED, DOT, PRECISION,
            )  # fmt: skip
    key = (batch * S + tl.maximum(j, 0)) * U + unit
    _give_away(dk, dv, d_bias, key, tl.maximum(j, 0), j >= 0, b_dk, b_dv, db, plain_scale, D, V, BD, BV)
