"""Triton kernels of product keys: the best k of P² sums of one token and head in registers."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def rising(value, WIDE: tl.constexpr):
    """Integers in the order of floating-point numbers, in the upper half of twice the width."""
    if WIDE:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(bits == -0x80000000, 0, bits)  # of both zeros neither is larger
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(bits == -0x8000, 0, bits)
        return (bits ^ ((bits >> 31) & 0x7FFF)) << 16


@triton.jit
def ranked(value, place, mask, WIDE: tl.constexpr):
    """Keys that sort falling by value, then rising by place; masked ones come last."""
    if WIDE:
        key = rising(value, True) + (0xFFFF - place).to(tl.int64)
        return tl.where(mask, key, -0x7FFFFFFFFFFFFFFF)
    else:
        return tl.where(mask, rising(value, False) + (0xFFFF - place), -0x7FFFFFFF)


@triton.jit
def value_of(key, element: tl.constexpr, WIDE: tl.constexpr):
    """The value that a key was made from."""
    if WIDE:
        bits = (key >> 32).to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        bits = key >> 16
        return (bits ^ ((bits >> 31) & 0x7FFF)).to(tl.int16).to(element, bitcast=True).to(tl.float32)


@triton.jit
def place_of(key):
    return (0xFFFF - (key & 0xFFFF)).to(tl.int32)


@triton.jit(do_not_specialize=["x_row", "y_row", "P", "K", "candidates"])
def topk_kernel(
    scores_x, scores_y, ranks, best_scores, ids, x_row, y_row, P, K, candidates,
    WIDE: tl.constexpr, BP: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The best K sums and their experts: both axes ranked, then the pairs of ranks that can be among the best.

    `*_row` are the distances of rows.
    """
    n = tl.program_id(0).to(tl.int64)
    p, c, k = tl.arange(0, BP), tl.arange(0, BC), tl.arange(0, BK)
    element: tl.constexpr = scores_x.dtype.element_ty
    best_x = tl.topk(ranked(tl.load(scores_x + n * x_row + p, mask=p < P, other=0.0), p, p < P, WIDE), BA)
    best_y = tl.topk(ranked(tl.load(scores_y + n * y_row + p, mask=p < P, other=0.0), p, p < P, WIDE), BA)
    rank_x = tl.load(ranks + c, mask=c < candidates, other=0)
    rank_y = tl.load(ranks + candidates + c, mask=c < candidates, other=0)
    sums = value_of(tl.gather(best_x, rank_x, 0), element, WIDE) + value_of(tl.gather(best_y, rank_y, 0), element, WIDE)
    best = tl.topk(ranked(sums.to(element), c, c < candidates, WIDE), BK)
    place = tl.where(k < K, place_of(best), 0)
    x = place_of(tl.gather(best_x, tl.gather(rank_x, place, 0), 0))
    y = place_of(tl.gather(best_y, tl.gather(rank_y, place, 0), 0))
    tl.store(best_scores + n * K + k, value_of(best, element, WIDE).to(element), mask=k < K)
    tl.store(ids + n * K + k, (x * P + y).to(tl.int64), mask=k < K)


@triton.jit(do_not_specialize=["P", "K"])
def spread_kernel(gradient, ids, d_x, d_y, P, K, BK: tl.constexpr, BP: tl.constexpr):
    """d_x[p] and d_y[p]: Σ gradient[k] over the places k whose expert has p on the axis, for BP keys."""
    n = tl.program_id(0).to(tl.int64)
    k, p = tl.arange(0, BK), tl.program_id(1) * BP + tl.arange(0, BP)
    e = tl.load(ids + n * K + k, mask=k < K, other=-1).to(tl.int32)
    value = tl.load(gradient + n * K + k, mask=k < K, other=0.0).to(tl.float32)
    x, y = tl.where(k < K, e // P, -1), tl.where(k < K, e % P, -1)
    total_x = tl.sum(tl.where(x[:, None] == p[None, :], value[:, None], 0.0), 0)
    total_y = tl.sum(tl.where(y[:, None] == p[None, :], value[:, None], 0.0), 0)
    tl.store(d_x + n * P + p, total_x.to(d_x.dtype.element_ty), mask=p < P)
    tl.store(d_y + n * P + p, total_y.to(d_y.dtype.element_ty), mask=p < P)
