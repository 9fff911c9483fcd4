"""Triton kernels for the expiry of keys, and for the lanes in which live keys stand.

With the keys of a document in falling order, better first, key number m expires at the w-th smallest place among the
keys before it in that order. The order is cut into blocks of N keys. At the start of each, only the N largest of the w
smallest places can be passed by the block's own keys: `window_kernel` finds them in one walk along the places, and
`expiry_kernel` lets the block's keys in one by one, all at once by counting.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _block(table, S, N: tl.constexpr, PACKED: tl.constexpr):
    """Start and end of a block's document, and the number of keys of the document that come before the block's."""
    start, end, index = 0, S, tl.program_id(0)
    if PACKED:
        start = tl.load(table + 3 * tl.program_id(0))
        end = tl.load(table + 3 * tl.program_id(0) + 1)
        index = tl.load(table + 3 * tl.program_id(0) + 2)
    return start, end, index * N


@triton.jit(do_not_specialize=["S", "keep"])
def window_kernel(ranks, windows, table, S, keep, N: tl.constexpr, BX: tl.constexpr, PACKED: tl.constexpr):
    """The w-th, (w − 1)-th, … smallest place among the keys before a block, N of them.

    The document's end stands for a place that is not there yet, −1 for one that never is.
    """
    start, end, before = _block(table, S, N, PACKED)
    row = tl.program_id(1).to(tl.int64)
    out = windows + (row * tl.num_programs(0) + tl.program_id(0)) * N
    number = tl.arange(0, N)
    tl.store(out + number, tl.where(number < keep, end, -1))
    tl.debug_barrier()
    lowest = end - before  # ranks from here on belong to keys before the block
    count, x = 0, start
    while (x < end) & (count < keep):
        place = x + tl.arange(0, BX)
        rank = tl.load(ranks + row * S + place, mask=place < end, other=-1)
        taken = rank >= lowest
        found = tl.sum(taken.to(tl.int32), 0)
        if count + found > keep - N:
            slot = keep - count - tl.cumsum(taken.to(tl.int32), 0)
            tl.store(out + slot, place, mask=taken & (slot >= 0) & (slot < N))
        count += found
        x += BX


@triton.jit
def _passed(new, place):
    """How many of the first i new keys lie at or below each place, `[i, place]`."""
    below = (new[:, None] <= place[None, :]).to(tl.int32)
    return tl.cumsum(below, 0) - below


@triton.jit(do_not_specialize=["S"])
def expiry_kernel(order, windows, table, expires, S, N: tl.constexpr, PACKED: tl.constexpr):
    """Expiry of the keys of a block: smallest place x up to which the keys before, in the order, are w."""
    start, end, before = _block(table, S, N, PACKED)
    row = tl.program_id(1).to(tl.int64)
    number = tl.arange(0, N)
    base = windows + (row * tl.num_programs(0) + tl.program_id(0)) * N
    old = tl.load(base + number)
    from_end = end - 1 - before - number
    real = from_end >= start
    new = tl.load(order + row * S + from_end, mask=real, other=S).to(tl.int32)
    # Row i counts the keys of the block before key i; a place needs as many of them at or below it as lie above it.
    first_old = tl.min(tl.where(_passed(new, old) >= number[None, :], old[None, :], end), 1)
    above = tl.sum((old[:, None] > new[None, :]).to(tl.int32), 0)
    first_new = tl.min(tl.where(_passed(new, new) >= above[None, :], new[None, :], end), 1)
    made = tl.minimum(tl.minimum(first_old, first_new), end)
    tl.store(expires + row * S + new, tl.maximum(made, new), mask=real)


@triton.jit(do_not_specialize=["S"])
def link_kernel(expires, ends, before, S, BX: tl.constexpr):
    """Who held a key's lane: key e(j) comes to where j was, unless the document has ended."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BX + tl.arange(0, BX)
    gone = tl.load(expires + row * S + place, mask=place < S, other=0)
    end = tl.load(ends + place, mask=place < S, other=0)
    tl.store(before + row * S + gone, place, mask=(place < S) & (gone > place) & (gone < end))


@triton.jit(do_not_specialize=["S"])
def hop_kernel(before, S, BX: tl.constexpr):
    """Leads every key four steps on towards the first of its lane; more where a neighbour has already been led on."""
    row = before + tl.program_id(1).to(tl.int64) * S
    place = tl.program_id(0) * BX + tl.arange(0, BX)
    mask = place < S
    for _ in tl.static_range(4):
        place = tl.load(row + place, mask=mask, other=0)
    tl.store(row + tl.program_id(0) * BX + tl.arange(0, BX), place, mask=mask)


@triton.jit(do_not_specialize=["S", "keep", "first_row", "blocks", "W"])
def birth_kernel(before, starts, table, S, keep, first_row, blocks, W, C: tl.constexpr, BX: tl.constexpr):
    """Puts each key into the table `[R, blocks, W]` at the first block after its birth; of two, the newer stays."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BX + tl.arange(0, BX)
    mask = place < S
    first = tl.load(before + row * S + place, mask=mask, other=0)
    lane = first - tl.load(starts + place, mask=mask, other=0)
    block = tl.where(place < first_row, 0, (place - first_row) // C + 1)
    held = mask & (lane < keep) & (block < blocks)
    tl.atomic_max(table + (row * blocks + block) * W + lane, place, mask=held)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["blocks", "W"])
def newest_kernel(table, blocks, W, BM: tl.constexpr, BL: tl.constexpr):
    """The newest key of every lane up to each block, in place."""
    base = table + tl.program_id(1).to(tl.int64) * blocks * W
    lane = tl.program_id(0) * BL + tl.arange(0, BL)
    newest = tl.full((BL,), -1, tl.int32)
    for first in range(0, blocks, BM):
        block = first + tl.arange(0, BM)
        place = base + block[:, None].to(tl.int64) * W + lane[None, :]
        mask = (block < blocks)[:, None] & (lane < W)[None, :]
        keys = tl.maximum(tl.load(place, mask=mask, other=-1), newest[None, :])
        keys = tl.associative_scan(keys, 0, _larger)
        tl.store(place, keys, mask=mask)
        newest = tl.max(keys, 0)
