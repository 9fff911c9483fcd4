"""When a key leaves the selection for good: the whole of a causal top-w selection in one integer per key.

A bias that does not depend on the query orders the keys once and for all. Row i keeps key j ≤ i exactly while fewer
than w keys up to i are better, and better keys never go away; so key j is visible for the rows j ≤ i < e(j).
"""

import torch
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._library import register_node


def expiry(bias: Tensor, keep: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The first row that no longer keeps each key, e(j) = min {i ≥ j : at least w keys in j' ≤ i are better than j}.

    Key j' is better than j if (bias_j', j') > (bias_j, j): of equal biases the more recent wins. A key may expire at
    birth, e(j) = j. A key that is never displaced expires at the end of its document.

    With r the rank of each key in this order and θ_i the w-th largest rank among keys 0 … i, which never falls,
    e(j) = max(j, first i with θ_i > r_j). All θ come from one descent through a wavelet tree of the ranks, level by
    level, for all rows at once.

    Args:
        bias: `[B, S, M]`, any floating dtype; not differentiated.
        keep: w ≥ 1.
        cu_seqlens: int32 boundaries of packed documents (B = 1); the selection restarts with each.

    Returns:
        `[B, S, M]` int32, j ≤ e(j) ≤ S.

    Cost:
        O(S log S) time in about 20·log2(S) tensor operations; at most 120 bytes per key at its peak.

    Example:
        >>> expiry(torch.tensor([3.0, 1.0, 2.0, 2.0]).reshape(1, 4, 1), keep=2).flatten().tolist()
        [4, 2, 3, 4]
    """
    batch, length, heads = bias.shape
    starts, ends = documents(length, cu_seqlens, bias.device)
    if keep >= longest_document(length, cu_seqlens):
        return ends.reshape(1, length, 1).expand(batch, length, heads)
    ranks = ranks_of(bias, cu_seqlens)
    thresholds = _least_ranks(ranks, keep, starts)
    # Counting the rows whose threshold is at most v gives the first row whose threshold exceeds v.
    counts = torch.zeros_like(thresholds)
    counts.scatter_add_(1, thresholds.long(), torch.ones_like(thresholds))
    del thresholds
    first = counts.cumsum(1, dtype=torch.int32)
    expired = first.gather(1, ranks.long())
    expired = torch.maximum(expired, torch.arange(length, dtype=torch.int32, device=bias.device))
    return expired.reshape(batch, heads, length).transpose(1, 2)


def in_window(bias: Tensor, keep: int, window: int, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The top-w selection among the last keys of each row, where keys that were displaced come back.

    Row i sees the keys i − window < j ≤ i of its document, and keeps those of rank r_j ≥ θ_i, the w-th largest there.

    Args:
        bias: `[B, S, M]`, any floating dtype; not differentiated.
        keep: w ≥ 1.
        window: keys that a row sees, itself included.
        cu_seqlens: int32 boundaries of packed documents (B = 1).

    Returns:
        The first row that no longer sees each key, r and θ, `[B, S, M]` int32.

    Cost:
        That of `expiry`.

    Example:
        >>> expires, ranks, limits = in_window(torch.tensor([3.0, 1.0, 2.0, 2.0]).reshape(1, 4, 1), keep=1, window=2)
        >>> [x.flatten().tolist() for x in (expires, ranks, limits)]
        [[2, 3, 4, 4], [3, 0, 1, 2], [3, 3, 1, 2]]
    """
    batch, length, heads = bias.shape
    starts, ends = documents(length, cu_seqlens, bias.device)
    ranks = ranks_of(bias, cu_seqlens)
    limits = _least_ranks(ranks, keep, starts, window)
    expires = torch.minimum(torch.arange(window, length + window, dtype=torch.int32, device=bias.device), ends)
    ranks, limits = (x.reshape(batch, heads, length).transpose(1, 2) for x in (ranks, limits))
    return expires.reshape(1, length, 1).expand(batch, length, heads), ranks, limits


def in_blocks(expires: Tensor, size: int, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The causal top-w selection smoothed: blocks of keys stay whole while more than half of their keys do.

    Keys of a full block only go, so that it is kept until the half of it has expired. While a block is being born, its
    rows keep all of it that they see, or nothing of it: those of limit θ_i take no key of rank r_j < θ_i.

    Args:
        expires: e, `[B, S, M]` int32 from `expiry`; 0 for keys that are never chosen.
        size: keys of a block; blocks restart with every document.
        cu_seqlens: int32 boundaries of packed documents (B = 1).

    Returns:
        The first row that no longer keeps a key's block, r and θ, `[B, S, M]` int32.

    Cost:
        A sort.

    Example:
        >>> keys = torch.tensor([3.0, 1.0, 2.0, 2.0]).reshape(1, 4, 1)
        >>> [x.flatten().tolist() for x in in_blocks(expiry(keys, 3), 2)]
        [[3, 3, 4, 4], [0, 0, -2, -2], [1, 0, -1, -2]]
    """
    batch, length, heads = expires.shape
    starts, ends = documents(length, cu_seqlens, expires.device)
    place = torch.arange(length, dtype=torch.int32, device=expires.device)
    begins = place - (place - starts) % size
    ends = torch.minimum(begins + size, ends)
    half = (ends - begins) // 2
    rows = expires.transpose(1, 2).flatten(0, 1)
    # In order of blocks and, within them, of expiries: the key with whose end no more than half of them is left.
    block = begins.long() * (length + 1)
    ordered = (block + rows).sort(dim=1).values
    lives = torch.maximum((ordered[:, (ends - 1 - half).long()] - block).int(), ends)
    chosen = rows > place
    born = torch.zeros((len(rows), length + 1), dtype=torch.int32, device=rows.device)
    born[:, :length] = chosen
    born.scatter_add_(1, torch.minimum(rows, ends).masked_fill(~chosen, length).long(), -chosen.int())
    own = born[:, :length].cumsum(1, dtype=torch.int32) > half
    limits = (~own).int() - begins
    ranks = (-begins).expand_as(rows)
    lives, ranks, limits = (x.reshape(batch, heads, length).transpose(1, 2) for x in (lives, ranks, limits))
    return lives, ranks, limits


def lanes_of_blocks(keep: int, size: int, keys: int) -> int:
    """How many keys of such blocks are alive at once, at most: older ones, of which more than half is kept, and one."""
    return min((keep // (size // 2 + 1) + 1) * size, keys)


def predecessors(lives: Tensor, lanes: int, starts: Tensor) -> Tensor:
    """The key in whose place each comes where the first to go makes room for the next to come; itself where none did.

    Args:
        lives: `[..., S]` int32, the first row without each key, the same for keys that share a block.
        lanes: the most keys that are alive at once.
        starts: `[S]` int32, where each key's document begins.

    Returns:
        `[..., S]` int32.
    """
    place = torch.arange(lives.shape[-1], dtype=torch.int32, device=lives.device)
    gone = lives.argsort(dim=-1, stable=True)[..., (place - lanes).clamp(min=0).long()]
    return torch.where(place - starts >= lanes, gone.int(), place)


def order_of(bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The keys in the order (document, bias, index), the best of a document last: ties are gone.

    Args:
        bias: `[B, S, M]`.
        cu_seqlens: document boundaries or None.

    Returns:
        `[B·M, S]` int64; a document from a to b fills the places a … b − 1.
    """
    batch, length, heads = bias.shape
    rows = bias.detach().transpose(1, 2).contiguous().view(batch * heads, length)
    order = rows.argsort(dim=1, stable=True)
    if cu_seqlens is not None:
        document = varlen.sequence_ids(cu_seqlens, length)[order]
        order = order.gather(1, document.argsort(dim=1, stable=True))
    return order


def ranks_of(bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Each key's place in that order, `[B·M, S]` int32: distinct integers."""
    return inverse(order_of(bias, cu_seqlens))


def inverse(order: Tensor) -> Tensor:
    """Where each number stands in rows of permutations, int32."""
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.empty(order.shape, dtype=torch.int32, device=order.device).scatter_(1, order, places)


def _least_ranks(ranks: Tensor, keep: int, starts: Tensor, window: int | None = None) -> Tensor:
    """The smallest rank that every row keeps of the keys that it sees, `[R, S]` int32."""
    thresholds: Tensor = thresholds_node(ranks, keep, window)
    # A document's first rows have seen fewer than w keys: all its ranks, which begin at its start, pass.
    young = torch.arange(ranks.shape[1], dtype=torch.int32, device=ranks.device) - starts < keep - 1
    return torch.where(young, starts, thresholds)


def _thresholds(ranks: Tensor, keep: int, window: int | None) -> Tensor:
    """The w-th largest rank of every prefix, or of its last `window` keys; anything where these are fewer than w.

    A node of the tree holds the ranks of an interval [a, a + 2m) in order of time. Ranks are distinct, so the node
    stands at the places a … a + 2m − 1 of its level, and the ranks before it that lie in lower halves are a/2.
    """
    rows, length = ranks.shape
    place = torch.arange(length, dtype=torch.int32, device=ranks.device)
    level = ranks.clone()
    node = torch.zeros_like(ranks)  # where the node of each row's answer begins
    inside = (place + 1).repeat(rows, 1)  # how many keys of the row's prefix are in that node
    # How many of them are too old.
    beyond = None if window is None else (place + 1 - window).clamp_(min=0).repeat(rows, 1)
    wanted = torch.full_like(ranks, keep - 1)  # how many of them are better than the answer
    lower_before = torch.zeros((rows, length + 1), dtype=torch.int32, device=ranks.device)
    # Every step writes into these: fresh pages would cost more than the arithmetic.
    lower, upper, other = torch.empty_like(ranks), torch.empty_like(ranks), torch.empty_like(ranks)
    index = torch.empty_like(ranks, dtype=torch.int64)
    in_lower, descend = torch.empty_like(ranks, dtype=torch.bool), torch.empty_like(ranks, dtype=torch.bool)
    for bit in reversed(range((length - 1).bit_length())):
        half = 1 << bit
        torch.eq(torch.bitwise_and(level, half, out=other), 0, out=in_lower)
        torch.cumsum(in_lower, 1, dtype=torch.int32, out=lower_before[:, 1:])
        torch.gather(lower_before, 1, torch.add(node, inside, out=index), out=lower)
        lower.sub_(torch.bitwise_right_shift(node, 1, out=other))
        torch.sub(inside, lower, out=upper)
        if beyond is None:
            torch.lt(wanted, upper, out=descend)
            torch.where(descend, upper, lower, out=inside)
        else:
            old = lower_before.gather(1, torch.add(node, beyond, out=index)).sub_(other)
            old_upper = beyond - old
            torch.lt(wanted, upper - old_upper, out=descend)
            torch.where(descend, upper, lower, out=inside)
            torch.where(descend, old_upper, old, out=beyond)
            upper.sub_(old_upper)
        wanted.sub_(upper.masked_fill_(descend, 0))
        node.add_(descend, alpha=half)
        if bit:
            # A stable partition of every node: lower half first, each half still in order of time.
            begin = place & -2 * half
            torch.sub(lower_before[:, :-1], begin >> 1, out=lower)
            torch.sub(place + half, lower, out=upper)
            torch.where(in_lower, lower.add_(begin), upper, out=other)
            upper.scatter_(1, index.copy_(other), level)
            level, upper = upper, level
    return node


thresholds_node = register_node(
    "dynamic_mask_thresholds(Tensor ranks, int keep, int? window) -> Tensor",
    _thresholds,
    lambda ranks, *others: torch.empty_like(ranks),
)


def documents(length: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Begin and end of every key's document, `[S]` int32 each."""
    if cu_seqlens is None:
        ends = torch.full((length,), length, dtype=torch.int32, device=device)
        return torch.zeros_like(ends), ends
    document = varlen.sequence_ids(cu_seqlens, length)
    return cu_seqlens[:-1][document], cu_seqlens[1:][document]


def longest_document(length: int, cu_seqlens: Tensor | None) -> int:
    """Tokens of the longest document, or of the row; a compiled graph knows no documents."""
    if cu_seqlens is None or torch.compiler.is_compiling():
        return length
    return max((end - start for start, end in varlen.spans(cu_seqlens)), default=0)
