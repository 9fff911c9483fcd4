"""Triton kernels that make the query and key of collinear attention from q and t, and their gradients.

One launch serves both: a program takes a block of rows of some query heads, or of some key heads, and reads its cosines
and sines once for all of them. The first R of K channels are rotated in pairs (p, p + R/2); pairs are read
side by side, so that what a thread reads lies together.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _pairs(cos, sin, row, real, R: tl.constexpr, BK: tl.constexpr):
    """Pairs (p, p + R/2) of rotated channels, which of them are real, and their cosines and sines at some rows."""
    p = tl.arange(0, BK // 2)
    mask = real[:, None] & (p < R // 2)[None, :]
    place = row[:, None] * (R // 2) + p[None, :]
    return p, mask, tl.load(cos + place, mask=mask, other=1.0), tl.load(sin + place, mask=mask, other=0.0)


@triton.jit
def _load(x, c, mask):
    return tl.load(x + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, c, value, mask):
    tl.store(x + c[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _rows(T, S, BT: tl.constexpr):
    """Rows of a block, and where they stand among the keys if they are queries."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    return row, row // T * S + (S - T) + row % T


@triton.jit
def _here(head, count):
    """Whether a head is one of so many, `[1, 1]`."""
    return tl.zeros((1, 1), tl.int32) + head < count


@triton.jit
def _queries(q, cos, sin, query, scale, row, place, real, head, H, K: tl.constexpr, R: tl.constexpr,
             STRICT: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    p, mask, b_cos, b_sin = _pairs(cos, sin, place, real, R, BK)
    for n in tl.static_range(HB):
        start, here = (row * H + head + n)[:, None] * K, _here(head + n, H)
        x, y = _load(q + start, p, mask & here), _load(q + start, p + R // 2, mask & here)
        if STRICT:
            norm = (x * x + y * y) * scale
            first, second = norm * b_cos, norm * b_sin
        else:
            first, second = x * (x * b_cos - y * b_sin) * scale, y * (y * b_cos + x * b_sin) * scale
        _store(query + start, p, first, mask & here)
        _store(query + start, p + R // 2, second, mask & here)
        if K > R:
            c = R + tl.arange(0, BK)
            alone = real[:, None] & (c < K)[None, :] & here
            z = _load(q + start, c, alone)
            _store(query + start, c, z * z * scale, alone)


@triton.jit
def _keys(t, cos, sin, key, row, real, head, G, K: tl.constexpr, R: tl.constexpr,
          STRICT: tl.constexpr, HEAD: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    p, mask, b_cos, b_sin = _pairs(cos, sin, row, real, R, BK)
    for n in tl.static_range(HB):
        start, here = (row * G + head + n)[:, None], _here(head + n, G)
        mine, made = t + start * (K // 2), key + start * K
        x = _load(mine, p, mask & here)
        if STRICT:
            first, second = x * b_cos, x * b_sin
        else:
            y = x
            if HEAD and R < K:
                y = _load(mine, (p + R // 2) % (K // 2), mask & here)
            first, second = x * b_cos - y * b_sin, y * b_cos + x * b_sin
        _store(made, p, first, mask & here)
        _store(made, p + R // 2, second, mask & here)
        if K > R:
            c = tl.arange(0, BK)
            alone = real[:, None] & (c < K - R)[None, :] & here
            if HEAD:
                z = _load(mine, (c + R) % (K // 2), alone)
            else:
                z = _load(mine, R // 2 + c % (K // 2 - R // 2), alone)
            _store(made, R + c, z, alone)


@triton.jit(do_not_specialize=["B", "T", "S", "H", "G"])
def transform_kernel(
    q, t, cos, sin, query, key, scale, B, T, S, H, G,
    K: tl.constexpr, R: tl.constexpr, STRICT: tl.constexpr, HEAD: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """q `[B, T, H, K]` → query, t `[B, S, G, K/2]` → key."""
    head, keys_from = tl.program_id(1) * HB, tl.cdiv(H, HB) * HB
    row, place = _rows(T, S, BT)
    if head < H:
        _queries(q, cos, sin, query, scale, row, place, row < B * T, head, H, K, R, STRICT, HB, BK)
    else:
        _keys(t, cos, sin, key, row, row < B * S, head - keys_from, G, K, R, STRICT, HEAD, HB, BK)


@triton.jit
def _query_gradients(d_query, q, cos, sin, dq, scale, row, place, real, head, H, K: tl.constexpr, R: tl.constexpr,
                     STRICT: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    p, mask, b_cos, b_sin = _pairs(cos, sin, place, real, R, BK)
    for n in tl.static_range(HB):
        start, here = (row * H + head + n)[:, None] * K, _here(head + n, H)
        x, y = _load(q + start, p, mask & here), _load(q + start, p + R // 2, mask & here)
        gx, gy = _load(d_query + start, p, mask & here), _load(d_query + start, p + R // 2, mask & here)
        if STRICT:
            both = 2 * scale * (gx * b_cos + gy * b_sin)
            first, second = x * both, y * both
        else:
            turn = (gx - gy) * b_sin
            first, second = (2 * gx * x * b_cos - turn * y) * scale, (2 * gy * y * b_cos - turn * x) * scale
        _store(dq + start, p, first, mask & here)
        _store(dq + start, p + R // 2, second, mask & here)
        if K > R:
            c = R + tl.arange(0, BK)
            alone = real[:, None] & (c < K)[None, :] & here
            z = 2 * scale * _load(q + start, c, alone) * _load(d_query + start, c, alone)
            _store(dq + start, c, z, alone)


@triton.jit
def _share(d_key, c, cos, sin, row, mask, R: tl.constexpr):
    """What the gradient of a key is for the coefficients that stand at channels c, where ties cross pairs."""
    first, turned = c < R // 2, mask & (c < R)[None, :]
    partner = tl.where(c < R, tl.where(first, c + R // 2, c - R // 2), c)
    place = row[:, None] * (R // 2) + tl.minimum(c, partner)[None, :]
    b_cos, b_sin = tl.load(cos + place, mask=turned, other=1.0), tl.load(sin + place, mask=turned, other=0.0)
    return _load(d_key, c, mask) * b_cos + tl.where(first, 1.0, -1.0)[None, :] * _load(d_key, partner, mask) * b_sin


@triton.jit
def _key_gradients(d_key, cos, sin, dt, row, real, head, G, K: tl.constexpr, R: tl.constexpr,
                   STRICT: tl.constexpr, HEAD: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    p, mask, b_cos, b_sin = _pairs(cos, sin, row, real, R, BK)
    for n in tl.static_range(HB):
        start, here = (row * G + head + n)[:, None], _here(head + n, G)
        given, made = d_key + start * K, dt + start * (K // 2)
        if HEAD and R < K:
            i = tl.arange(0, BK // 2)
            whole = real[:, None] & (i < K // 2)[None, :] & here
            both = _share(given, i, cos, sin, row, whole, R) + _share(given, i + K // 2, cos, sin, row, whole, R)
            _store(made, i, both, whole)
        else:
            x, y = _load(given, p, mask & here), _load(given, p + R // 2, mask & here)
            total = x * b_cos + y * b_sin
            if not STRICT:
                total += y * b_cos - x * b_sin
            _store(made, p, total, mask & here)
            if K > R:
                c = R + tl.arange(0, BK // 2)
                alone = real[:, None] & (c < R + (K - R) // 2)[None, :] & here
                z = _load(given, c, alone) + _load(given, c + (K - R) // 2, alone)
                _store(made, c - R // 2, z, alone)


@triton.jit(do_not_specialize=["B", "T", "S", "H", "G"])
def transform_gradient_kernel(
    d_query, d_key, q, cos, sin, dq, dt, scale, B, T, S, H, G,
    K: tl.constexpr, R: tl.constexpr, STRICT: tl.constexpr, HEAD: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Gradients of q and t from those of query and key; both are sums over one pair, so nothing is added atomically."""
    head, keys_from = tl.program_id(1) * HB, tl.cdiv(H, HB) * HB
    row, place = _rows(T, S, BT)
    if head < H:
        _query_gradients(d_query, q, cos, sin, dq, scale, row, place, row < B * T, head, H, K, R, STRICT, HB, BK)
    else:
        _key_gradients(d_key, cos, sin, dt, row, row < B * S, head - keys_from, G, K, R, STRICT, HEAD, HB, BK)


@triton.jit
def _tied(K: tl.constexpr, R: tl.constexpr, HEAD: tl.constexpr, BK: tl.constexpr):
    """Coefficients, and the two channels of each."""
    i = tl.arange(0, BK // 2)
    if HEAD or R == K or R == 0:
        one, other = i, i + K // 2
    else:
        one = tl.where(i < R // 2, i, i + R // 2)
        other = one + tl.where(i < R // 2, R // 2, K // 2 - R // 2)
    return i, one, other


@triton.jit(do_not_specialize=["rows"])
def coefficient_kernel(
    raw, t, rows, K: tl.constexpr, R: tl.constexpr, HEAD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr
):
    """t `[rows, K/2]` = relu of the mean of the tied channels of raw `[rows, K]`."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i, one, other = _tied(K, R, HEAD, BK)
    mask = (row < rows)[:, None] & (i < K // 2)[None, :]
    total = _load(raw + row[:, None] * K, one, mask) + _load(raw + row[:, None] * K, other, mask)
    _store(t + row[:, None] * (K // 2), i, tl.maximum(total * 0.5, 0.0), mask)


@triton.jit(do_not_specialize=["rows"])
def coefficient_gradient_kernel(
    dt, t, d_raw, rows, K: tl.constexpr, R: tl.constexpr, HEAD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr
):
    """Half of dt at both channels of a tie where t is positive."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i, one, other = _tied(K, R, HEAD, BK)
    mask = (row < rows)[:, None] & (i < K // 2)[None, :]
    made = _load(dt + row[:, None] * (K // 2), i, mask) * 0.5
    made = tl.where(_load(t + row[:, None] * (K // 2), i, mask) > 0, made, 0.0)
    _store(d_raw + row[:, None] * K, one, made, mask)
    _store(d_raw + row[:, None] * K, other, made, mask)
