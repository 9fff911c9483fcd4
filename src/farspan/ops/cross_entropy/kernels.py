"""Triton kernel of cross entropy in place: a program takes a row of logits, and reads it twice."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _logits(p_row, o, S, classes):
    """Logits of the columns `o` as float32, −inf behind the classes: rows are read as a whole, 16 bytes at once."""
    b = tl.load(p_row + o, mask=o < S, other=0).to(tl.float32)
    return tl.where(o < classes, b, float("-inf"))


@triton.jit(do_not_specialize=["S", "classes"])
def cross_entropy_kernel(
    p_logits, p_labels, p_nll, S, classes, BV: tl.constexpr, SLOPE: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    if EVEN:
        S = S // 16 * 16
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_n * S
    label = tl.load(p_labels + i_n)
    kept = label >= 0
    # A label behind the classes, which a compiled caller does not check, gives no number.
    picked = tl.load(p_row + tl.maximum(label, 0), mask=label < classes, other=float("nan")).to(tl.float32)
    # The largest logit so far and the sum of exponentials relative to it; finite, so that −inf is a logit like others.
    largest, total = tl.full([], -3e38, tl.float32), tl.zeros([], tl.float32)
    for first in range(0, classes, BV):
        b = _logits(p_row, first + tl.arange(0, BV), S, classes)
        before, largest = largest, tl.maximum(largest, tl.max(b, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(b - largest), axis=0)
    tl.store(p_nll + i_n, tl.where(kept, largest + tl.log(total) - picked, 0.0))
    if SLOPE:
        share = 1 / total
        for first in range(0, S, BV):
            o = first + tl.arange(0, BV)
            b_slope = tl.exp(_logits(p_row, o, S, classes) - largest) * share - tl.where(o == label, 1.0, 0.0)
            # Rows that are not scored give nothing, whatever they hold.
            b_slope = tl.where(kept, b_slope, 0.0)
            tl.store(p_row + o, b_slope.to(p_logits.dtype.element_ty), mask=o < S)
