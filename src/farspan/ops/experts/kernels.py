"""Triton kernels of retrieved experts; a row of a table is read where it is used, and not kept.

The tables of some ten thousand experts fit the card's cache, and so do the rows of a stretch of tokens: what bounds the
kernels is how many rows a multiprocessor can ask for at once. Every sum runs in a fixed order in one program.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def activate(h, ACT: tl.constexpr):
    """The activation and its slope."""
    if ACT == "relu":
        return tl.maximum(h, 0.0), tl.where(h > 0, 1.0, 0.0)
    elif ACT == "sigmoid":
        s = tl.sigmoid(h)
        return s, s * (1 - s)
    elif ACT == "silu":
        s = tl.sigmoid(h)
        return h * s, s * (1 + h * (1 - s))
    elif ACT == "gelu":
        below = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        return h * below, below + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    else:
        tl.static_assert(ACT == "gelu_tanh")
        # (1 + tanh z) / 2 = sigmoid(2 z)
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        return h * s, s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)


@triton.jit(do_not_specialize=["R"])
def dots_kernel(
    x, ids, weights, table, hidden, coefficients, R,
    ACT: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """hidden[n, r] = ⟨x_n, table[id_nr]⟩ and coefficients = weights · act(hidden), for BR slots of a token."""
    n = tl.program_id(0).to(tl.int64)
    r, c = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BD)
    e = tl.load(ids + n * R + r, mask=r < R, other=0)
    b_x = tl.load(x + n * D + c, mask=c < D, other=0.0).to(tl.float32)
    rows = tl.load(table + e[:, None] * D + c[None, :], mask=(r < R)[:, None] & (c < D)[None, :], other=0.0)
    h = tl.sum(rows.to(tl.float32) * b_x[None, :], 1)
    w = tl.load(weights + n * R + r, mask=r < R, other=0.0).to(tl.float32)
    value, _ = activate(h, ACT)
    tl.store(hidden + n * R + r, h, mask=r < R)
    tl.store(coefficients + n * R + r, w * value, mask=r < R)


@triton.jit(do_not_specialize=["R"])
def mix_kernel(coefficients, ids, table, out, R, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """out[n] = Σ_r c_nr table[id_nr] for BD channels of a token."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        e = tl.load(ids + n * R + r, mask=r < R, other=0)
        w = tl.load(coefficients + n * R + r, mask=r < R, other=0.0).to(tl.float32)
        rows = tl.load(table + e[:, None] * D + c[None, :], mask=(r < R)[:, None] & (c < D)[None, :], other=0.0)
        acc += tl.sum(rows.to(tl.float32) * w[:, None], 0)
    tl.store(out + n * D + c, acc.to(out.dtype.element_ty), mask=c < D)


@triton.jit(do_not_specialize=["R", "E"])
def gradient_kernel(
    x, dy, weights, hidden, up, order, begins, piece_ends, part_ends, experts, d_hidden, d_weights, d_down, d_up,
    sums, R, E, ACT: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of an expert's two rows, of its pre-activations and of its weights, over at most PIECE of its slots.

    Both rows' gradients are sums over the same tokens, whose x and dy are read once. A piece that is not all of its
    expert leaves float32 sums in `sums`.
    """
    piece = tl.program_id(0)
    e = tl.load(experts + piece).to(tl.int64)
    if e < E:
        c, r = tl.arange(0, BD), tl.arange(0, BR)
        first, last = tl.load(begins + e), tl.load(begins + e + 1)
        pieces = tl.cdiv(last - first, PIECE)
        number = piece - (tl.load(piece_ends + e) - pieces)
        start = first + number * PIECE
        stop = tl.minimum(start + PIECE, last)
        b_v = tl.load(up + e * D + c, mask=c < D, other=0.0).to(tl.float32)
        du, dv = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
        for begin in range(start, stop, BR):
            m_r = begin + r < stop
            slot = tl.load(order + begin + r, mask=m_r, other=0)
            place, m = (slot // R)[:, None] * D + c[None, :], m_r[:, None] & (c < D)[None, :]
            b_dy = tl.load(dy + place, mask=m, other=0.0).to(tl.float32)
            b_x = tl.load(x + place, mask=m, other=0.0).to(tl.float32)
            w = tl.load(weights + slot, mask=m_r, other=0.0).to(tl.float32)
            value, slope = activate(tl.load(hidden + slot, mask=m_r, other=0.0), ACT)
            dc = tl.sum(b_dy * b_v[None, :], 1)
            dh = w * slope * dc
            tl.store(d_weights + slot, (value * dc).to(d_weights.dtype.element_ty), mask=m_r)
            tl.store(d_hidden + slot, dh, mask=m_r)
            dv += tl.sum(b_dy * (w * value)[:, None], 0)
            du += tl.sum(b_x * dh[:, None], 0)
        if pieces == 1:
            tl.store(d_down + e * D + c, du.to(d_down.dtype.element_ty), mask=c < D)
            tl.store(d_up + e * D + c, dv.to(d_up.dtype.element_ty), mask=c < D)
        else:
            place = sums + 2 * D * (tl.load(part_ends + e) - pieces + number).to(tl.int64) + c
            tl.store(place, du, mask=c < D)
            tl.store(place + D, dv, mask=c < D)


@triton.jit(do_not_specialize=["E"])
def join_kernel(
    sums, begins, part_ends, experts, d_down, d_up, E, D: tl.constexpr, PIECE: tl.constexpr, BD: tl.constexpr
):
    """Adds up the pieces of an expert that has several, in their order; the program of its first piece does it."""
    part, c = tl.program_id(0), tl.arange(0, BD)
    e = tl.load(experts + part).to(tl.int64)
    if e < E:
        pieces = tl.cdiv(tl.load(begins + e + 1) - tl.load(begins + e), PIECE)
        if part == tl.load(part_ends + e) - pieces:
            du, dv = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
            for i in range(pieces):
                place = sums + 2 * D * (part + i).to(tl.int64) + c
                du += tl.load(place, mask=c < D, other=0.0)
                dv += tl.load(place + D, mask=c < D, other=0.0)
            tl.store(d_down + e * D + c, du.to(d_down.dtype.element_ty), mask=c < D)
            tl.store(d_up + e * D + c, dv.to(d_up.dtype.element_ty), mask=c < D)
