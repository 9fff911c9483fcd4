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


@triton.jit(do_not_specialize=["N", "R"])
def dots_kernel(
    x, ids, vectors, hidden, N, R,
    STRETCH: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden[i, n, r] = ⟨x_n, vectors[id_nr]⟩ over block i of BD channels, for STRETCH slots of a token."""
    n, c = tl.program_id(0).to(tl.int64), tl.program_id(2) * BD + tl.arange(0, BD)
    b_x = tl.load(x + n * D + c, mask=c < D, other=0.0).to(tl.float32)
    hidden += (tl.program_id(2).to(tl.int64) * N + n) * R
    first = tl.program_id(1) * STRETCH
    for start in tl.range(first, tl.minimum(first + STRETCH, R), BR, num_stages=STAGES):
        r = start + tl.arange(0, BR)
        e = tl.load(ids + n * R + r, mask=r < R, other=0)
        rows = tl.load(vectors + e[:, None] * D + c[None, :], mask=(r < R)[:, None] & (c < D)[None, :], other=0.0)
        tl.store(hidden + r, tl.sum(rows.to(tl.float32) * b_x[None, :], 1), mask=r < R)


@triton.jit
def summed(hidden, slot, mask, slots, PARTS: tl.constexpr):
    """The pre-activations of some slots from those of their blocks of channels."""
    h = tl.load(hidden + slot, mask=mask, other=0.0)
    for i in tl.static_range(1, PARTS):
        h += tl.load(hidden + i * slots + slot, mask=mask, other=0.0)
    return h


@triton.jit(do_not_specialize=["N", "R"])
def mix_kernel(
    coefficients, hidden, ids, vectors, out, N, R,
    ACT: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[n] = Σ_r c_nr act(h_nr) vectors[id_nr] for BD channels of a token; with ACT = "none" no factor act(h_nr).

    A warp holds whole rows: a sum over rows of several warps would pass through shared memory at every step.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    for start in tl.range(0, R, BR, num_stages=STAGES):
        r = start + tl.arange(0, BR)
        e = tl.load(ids + n * R + r, mask=r < R, other=0)
        w = tl.load(coefficients + n * R + r, mask=r < R, other=0.0).to(tl.float32)
        if ACT != "none":
            value, _ = activate(summed(hidden, n * R + r, r < R, N.to(tl.int64) * R, PARTS), ACT)
            w *= value
        rows = tl.load(vectors + e[:, None] * D + c[None, :], mask=(r < R)[:, None] & (c < D)[None, :], other=0.0)
        acc += tl.sum(rows.to(tl.float32) * w[:, None], 0)
    tl.store(out + n * D + c, acc.to(out.dtype.element_ty), mask=c < D)


@triton.jit(do_not_specialize=["N", "pieces"])
def gradient_kernel(
    x, dy, weights, hidden, up, ids, order, begins, d_hidden, d_weights, d_down, d_up, sums, N, pieces,
    R: tl.constexpr, ACT: tl.constexpr, PARTS: tl.constexpr, PIECE: tl.constexpr, TABLES: tl.constexpr,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of an expert's two rows, if `TABLES`, of its pre-activations and weights, from its slots in `order`.

    Both rows' gradients are sums over the same tokens, whose x and dy are read once. An expert with more than PIECE
    slots is cut wherever a stretch of PIECE places of `order` begins, and its pieces leave float32 sums: place 2 i of
    `sums` has what came into stretch i, place 2 i + 1 what begins in it. The first programs are of the `pieces`
    stretches and do what came in, the others are of the experts.
    """
    i = tl.program_id(0)
    slots = N.to(tl.int64) * R
    behind = i < pieces
    if behind:
        e = tl.load(ids + tl.load(order + i.to(tl.int64) * PIECE))
    else:
        e = (i - pieces).to(tl.int64)
    first, last = tl.load(begins + e), tl.load(begins + e + 1)
    whole = last - first <= PIECE
    start = tl.where(behind, i.to(tl.int64) * PIECE, first)
    stop = tl.where(whole, last, tl.minimum(last, (start // PIECE + 1) * PIECE))
    if (i >= pieces) | ((last - first > PIECE) & (first < start)):
        c, r = tl.arange(0, BD), tl.arange(0, BR)
        b_v = tl.load(up + e * D + c, mask=c < tl.where(start < stop, D, 0), other=0.0).to(tl.float32)
        du, dv = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
        for begin in tl.range(0, (stop - start).to(tl.int32), BR, num_stages=STAGES):
            m_r = start + begin + r < stop
            slot = tl.load(order + start + begin + r, mask=m_r, other=0)
            place, m = (slot // R)[:, None] * D + c[None, :], m_r[:, None] & (c < D)[None, :]
            b_dy = tl.load(dy + place, mask=m, other=0.0).to(tl.float32)
            if TABLES:
                b_x = tl.load(x + place, mask=m, other=0.0).to(tl.float32)
            w = tl.load(weights + slot, mask=m_r, other=0.0).to(tl.float32)
            value, slope = activate(summed(hidden, slot, m_r, slots, PARTS), ACT)
            dc = tl.sum(b_dy * b_v[None, :], 1)
            dh = w * slope * dc
            tl.store(d_weights + slot, (value * dc).to(d_weights.dtype.element_ty), mask=m_r)
            tl.store(d_hidden + slot, dh, mask=m_r)
            if TABLES:
                dv += tl.sum(b_dy * (w * value)[:, None], 0)
                du += tl.sum(b_x * dh[:, None], 0)
        if TABLES:
            if whole:
                tl.store(d_down + e * D + c, du.to(d_down.dtype.element_ty), mask=c < D)
                tl.store(d_up + e * D + c, dv.to(d_up.dtype.element_ty), mask=c < D)
            else:
                place = sums + (start // PIECE * 2 + tl.where(behind, 0, 1)) * 2 * D + c
                tl.store(place, du, mask=c < D)
                tl.store(place + D, dv, mask=c < D)


@triton.jit
def join_kernel(sums, ids, order, begins, d_down, d_up, PIECE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Adds up the pieces of an expert that has several, in their order; the program of its second piece does it."""
    piece, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    e = tl.load(ids + tl.load(order + piece * PIECE))
    first, last = tl.load(begins + e), tl.load(begins + e + 1)
    if (last - first > PIECE) & (first // PIECE + 1 == piece):
        place = sums + (2 * piece - 1) * 2 * D + c
        du = tl.load(place, mask=c < D, other=0.0)
        dv = tl.load(place + D, mask=c < D, other=0.0)
        for i in range((tl.cdiv(last, PIECE) - piece).to(tl.int32)):
            place = sums + (piece + i) * 4 * D + c
            du += tl.load(place, mask=c < D, other=0.0)
            dv += tl.load(place + D, mask=c < D, other=0.0)
        tl.store(d_down + e * D + c, du.to(d_down.dtype.element_ty), mask=c < D)
        tl.store(d_up + e * D + c, dv.to(d_up.dtype.element_ty), mask=c < D)
