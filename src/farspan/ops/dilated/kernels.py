"""Triton kernels that join what the boxes of dilated attention give: outputs by their log-sum-exps, gradients by sum.

The gradients by rows with few keys are computed here whole. In the others one program takes a block of tokens of one
head, and reads of every box that has the head the rows that it selects. No number of a box is known at compile time, or
every length would have kernels of its own: `boxes.table` holds them. Divisions are products with a reciprocal, since a
true one takes as long as a memory access.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _divided(n, numbers):
    """Quotient and rest of `n` by a divisor that stands before its reciprocal and the shift."""
    factor, shift = tl.load(numbers + 1).to(tl.uint32), tl.load(numbers + 2).to(tl.uint32)
    quotient = (tl.umulhi(n.to(tl.uint32) * 2, factor) >> shift).to(tl.int32)
    return quotient, n - quotient * tl.load(numbers)


@triton.jit
def _has(boxes, index, head, heads, WORD: tl.constexpr):
    """Whether a box has the head."""
    return (tl.load(boxes + index // WORD * heads + head) >> (index % WORD)) & 1


@triton.jit
def _locate(boxes, index, token, head, heads, BOXES: tl.constexpr, NUMBERS: tl.constexpr, WORD: tl.constexpr):
    """Which of the tokens a box selects, and their rows: by head and by token."""
    box = boxes + ((BOXES + WORD - 1) // WORD + index * NUMBERS) * heads + head * NUMBERS
    begin, length, rows = tl.load(box), tl.load(box + 1), tl.load(box + 2)
    count, slot, offset = tl.load(box + 3), tl.load(box + 4), tl.load(box + 5)
    inside = token - begin
    segment, rest = _divided(inside, box + 6)
    place = rest - offset
    row, between = _divided(place, box + 9)
    taken = (inside >= 0) & (inside < length) & (place >= 0) & (between == 0)
    return taken, (segment * count + slot) * rows + row, (segment * rows + row) * count + slot


@triton.jit(do_not_specialize=["first", "end", "tokens", "H"])
def merge_kernel(
    outs, lses, boxes, out, total, base_lse, first, end, tokens, H,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NUMBERS: tl.constexpr, WORD: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Joins outputs `[n, c, h, D]` with log-sum-exps `[n, h, c]` into `[N, H, D]` and `[H, N]`.

    With BASE, `out` already holds what a pattern that takes every row gives, and is written only where that changes.
    """
    head = tl.program_id(1)
    token = first + tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, BD)
    real, fits = token < end, channel < D
    acc = tl.zeros((BT, BD), tl.float32)
    weight = tl.zeros((BT,), tl.float32)
    top = tl.full((BT,), float("-inf"), tl.float32)
    covered = tl.zeros((BT,), tl.int1)
    for i in tl.static_range(len(outs)):
        if _has(boxes, i, head, H, WORD):
            taken, by_head, by_token = _locate(boxes, i, token, head, H, len(outs), NUMBERS, WORD)
            taken = taken & real
            covered = covered | taken
            lse = tl.load(lses[i] + by_head, mask=taken, other=float("-inf"))
            part = tl.load(
                outs[i] + by_token.to(tl.int64)[:, None] * D + channel[None, :],
                mask=taken[:, None] & fits[None, :],
                other=0.0,
            ).to(tl.float32)
            higher = tl.maximum(top, lse)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            old, new = tl.exp(top - finite), tl.exp(lse - finite)
            acc = acc * old[:, None] + part * new[:, None]
            weight = weight * old + new
            top = higher
    place = out + (token.to(tl.int64)[:, None] * H + head) * D + channel[None, :]
    written = real
    if BASE:
        written = covered
        width = boxes + ((len(outs) + WORD - 1) // WORD + len(outs) * NUMBERS) * H
        segment, inside = _divided(token, width)
        lse = tl.load(base_lse + (segment.to(tl.int64) * H + head) * tl.load(width) + inside, mask=real, other=0.0)
        part = tl.load(place, mask=covered[:, None] & fits[None, :], other=0.0).to(tl.float32)
        higher = tl.maximum(top, lse)
        old, new = tl.exp(top - higher), tl.exp(lse - higher)
        acc = acc * old[:, None] + part * new[:, None]
        weight = weight * old + new
        top = higher
    empty = weight == 0.0
    acc = acc / tl.where(empty, 1.0, weight)[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=written[:, None] & fits[None, :])
    lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, weight)))
    tl.store(total + head.to(tl.int64) * tokens + token, lse, mask=real)


@triton.jit(do_not_specialize=["first", "end", "tokens", "width", "count", "H", "scale"])
def first_rows_kernel(
    grad, q, k, v, total, lse, patterns, to_q, to_k, to_v, first, end, tokens, width, count, H, scale,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the rows that see no key before their window give to the gradients, `[n, H, ROWS, D]` each, in float32.

    A window is the first ROWS of `width` tokens. Of every pattern `patterns` holds the segment, the dilation and the
    offset of each head. The log-sum-exps `[H, N]` of these rows are raised in `lse`, so that boxes give them no weight.
    """
    window, head = tl.program_id(0), tl.program_id(1)
    place, channel = tl.arange(0, ROWS), tl.arange(0, BD)
    start = window * width
    token = start + place
    real = (place < width) & (first + token < end)
    few = real
    seen = tl.zeros((ROWS, ROWS), tl.float32)  # how many patterns show a key to a row
    for i in range(count):
        numbers = patterns + i * (H + 2)
        inside = token % tl.load(numbers)
        begin, taken = token - inside, inside % tl.load(numbers + 1) == tl.load(numbers + 2 + head)
        few = few & ((begin >= start) | (taken == 0))
        both = taken[:, None] & taken[None, :] & (begin[:, None] == begin[None, :])
        seen += both.to(tl.float32)
    shown = few[:, None] & real[None, :] & (place[:, None] >= place[None, :]) & (seen > 0)
    at = ((first + token).to(tl.int64)[:, None] * H + head) * D + channel[None, :]
    mask = real[:, None] & (channel < D)[None, :]
    rows = tl.load(q + at, mask=mask, other=0.0).to(tl.float32)
    keys = tl.load(k + at, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(v + at, mask=mask, other=0.0).to(tl.float32)
    given = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    line = head.to(tl.int64) * tokens + first + token
    whole = tl.load(total + line, mask=real, other=0.0)
    tl.store(lse + line, whole + 1e4, mask=few)
    scores = tl.dot(rows, tl.trans(keys), input_precision="ieee") * scale - whole[:, None]
    weights = tl.where(shown, seen * tl.exp(tl.where(shown, scores, 0.0)), 0.0)
    slopes = tl.dot(given, tl.trans(values), input_precision="ieee")
    slopes = weights * (slopes - tl.sum(weights * slopes, axis=1)[:, None]) * scale
    at = ((window.to(tl.int64) * H + head) * ROWS + place)[:, None] * D + channel[None, :]
    mask = (channel < D)[None, :]
    tl.store(to_q + at, tl.dot(slopes, keys, input_precision="ieee"), mask=mask)
    tl.store(to_k + at, tl.dot(tl.trans(slopes), rows, input_precision="ieee"), mask=mask)
    tl.store(to_v + at, tl.dot(tl.trans(weights), given, input_precision="ieee"), mask=mask)


@triton.jit(do_not_specialize=["first", "end", "width", "rows", "H"])
def sum_kernel(
    parts, boxes, firsts, out, first, end, width, rows, H,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NUMBERS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Adds gradients `[n, c, h, D]` up to `[N, H, D]`, and float32 `[m, H, rows, D]` of the first of `width` tokens."""
    head = tl.program_id(1)
    token = first + tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.arange(0, BD)
    real, fits = token < end, channel < D
    window = (token - first) // width
    inside = token - first - window * width
    begun = firsts + ((window.to(tl.int64) * H + head) * rows + inside)[:, None] * D + channel[None, :]
    within = real & (inside < rows)
    acc = tl.load(begun, mask=within[:, None] & fits[None, :], other=0.0)
    for i in tl.static_range(len(parts)):
        if _has(boxes, i, head, H, WORD):
            taken, _, by_token = _locate(boxes, i, token, head, H, len(parts), NUMBERS, WORD)
            place = parts[i] + by_token.to(tl.int64)[:, None] * D + channel[None, :]
            acc += tl.load(place, mask=(taken & real)[:, None] & fits[None, :], other=0.0).to(tl.float32)
    place = out + (token.to(tl.int64)[:, None] * H + head) * D + channel[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=real[:, None] & fits[None, :])
