"""When a key leaves the selection for good: the whole of a causal top-w selection in one integer per key.

A bias that does not depend on the query orders the keys once and for all. Row i keeps key j ≤ i exactly while fewer
than w keys up to i are better, and better keys never go away; so key j is visible for the rows j ≤ i < e(j).
"""

import torch
from torch import Tensor

from farspan.ops import varlen


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
    thresholds = _thresholds(ranks, keep)
    # A document's first rows have seen fewer than w keys: all its ranks, which begin at its start, pass.
    young = torch.arange(length, dtype=torch.int32, device=bias.device) - starts < keep - 1
    thresholds = torch.where(young, starts, thresholds)
    # Counting the rows whose threshold is at most v gives the first row whose threshold exceeds v.
    counts = torch.zeros_like(thresholds)
    counts.scatter_add_(1, thresholds.long(), torch.ones_like(thresholds))
    del thresholds
    first = counts.cumsum(1, dtype=torch.int32)
    expired = first.gather(1, ranks.long())
    expired = torch.maximum(expired, torch.arange(length, dtype=torch.int32, device=bias.device))
    return expired.reshape(batch, heads, length).transpose(1, 2)


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
        document = varlen.sequence_ids(cu_seqlens)[order]
        order = order.gather(1, document.argsort(dim=1, stable=True))
    return order


def ranks_of(bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Each key's place in that order, `[B·M, S]` int32: distinct integers."""
    return inverse(order_of(bias, cu_seqlens))


def inverse(order: Tensor) -> Tensor:
    """Where each number stands in rows of permutations, int32."""
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.empty(order.shape, dtype=torch.int32, device=order.device).scatter_(1, order, places)


def _thresholds(ranks: Tensor, keep: int) -> Tensor:
    """The w-th largest rank of every prefix, `[R, S]` int32; anything where the prefix has fewer than w keys.

    A node of the tree holds the ranks of an interval [a, a + 2m) in order of time. Ranks are distinct, so the node
    stands at the places a … a + 2m − 1 of its level, and the ranks before it that lie in lower halves are a/2.
    """
    rows, length = ranks.shape
    place = torch.arange(length, dtype=torch.int32, device=ranks.device)
    level = ranks.clone()
    node = torch.zeros_like(ranks)  # where the node of each row's answer begins
    inside = (place + 1).repeat(rows, 1)  # how many keys of the row's prefix are in that node
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
        torch.lt(wanted, upper, out=descend)
        torch.where(descend, upper, lower, out=inside)
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


def documents(length: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Begin and end of every key's document, `[S]` int32 each."""
    if cu_seqlens is None:
        ends = torch.full((length,), length, dtype=torch.int32, device=device)
        return torch.zeros_like(ends), ends
    document = varlen.sequence_ids(cu_seqlens)
    return cu_seqlens[:-1][document], cu_seqlens[1:][document]


def longest_document(length: int, cu_seqlens: Tensor | None) -> int:
    """Tokens of the longest document, or of the row."""
    if cu_seqlens is None:
        return length
    return max((end - start for start, end in varlen.spans(cu_seqlens)), default=0)
