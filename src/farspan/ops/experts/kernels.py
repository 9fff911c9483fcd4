"""Triton kernels of the three maps around retrieved experts; a row of a table is read where it is used, and not kept.

The tables of some ten thousand experts fit the card's cache, and so do the rows of a stretch of tokens: what bounds the
kernels is how many rows a multiprocessor can ask for at once. Every sum runs in a fixed order in one program.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["R"])
def dots_kernel(x, ids, table, out, R, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """out[n, r] = ⟨x_n, table[id_nr]⟩ for BR slots of a token."""
    n = tl.program_id(0).to(tl.int64)
    r, d = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BD)
    e = tl.load(ids + n * R + r, mask=r < R, other=0)
    acc = tl.zeros((BR,), tl.float32)
    for start in range(0, D, BD):
        c = start + d
        b_x = tl.load(x + n * D + c, mask=c < D, other=0.0).to(tl.float32)
        rows = tl.load(table + e[:, None] * D + c[None, :], mask=(r < R)[:, None] & (c < D)[None, :], other=0.0)
        acc += tl.sum(rows.to(tl.float32) * b_x[None, :], 1)
    tl.store(out + n * R + r, acc, mask=r < R)


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


@triton.jit(do_not_specialize=["R"])
def gather_kernel(coefficients, order, begins, x, out, R, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """out[e] = Σ c_s x_{s // R} over the slots s = order[i] of expert e, for BD channels."""
    expert = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    first, last = tl.load(begins + expert), tl.load(begins + expert + 1)
    acc = tl.zeros((BD,), tl.float32)
    for start in range(first, last, BR):
        i = start + tl.arange(0, BR)
        slot = tl.load(order + i, mask=i < last, other=0)
        w = tl.load(coefficients + slot, mask=i < last, other=0.0).to(tl.float32)
        place = x + (slot // R)[:, None] * D + c[None, :]
        rows = tl.load(place, mask=(i < last)[:, None] & (c < D)[None, :], other=0.0)
        acc += tl.sum(rows.to(tl.float32) * w[:, None], 0)
    tl.store(out + expert * D + c, acc.to(out.dtype.element_ty), mask=c < D)
