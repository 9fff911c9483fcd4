"""Causal top-w attention in O(T·w): every block of queries gathers the at most w + C keys that are alive in it.

From row w of a document on, exactly one key expires with every new one. So w lanes hold the live keys: a key takes the
lane of the one that it displaces, e(j) = i puts key i where j was. What a block of queries needs is then one row of a
table, the newest key of every lane when the block begins, and the block's own keys. No list depends on the data's
values in its size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._library import register_node

# Entries of the score matrix that are formed at once: in the cache of a core, or enough to fill a GPU.
SCORES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}
HIDDEN = -1e30


def attend_live(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    expires: Tensor,
    starts: Tensor,
    *,
    scale: float,
    keep: int,
    chosen: Sequence[Tensor] | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Attention of query i to the keys j ≤ i < e(j).

    Args:
        q: `[B, T, H, K]`; the last query stands at the last key.
        k: `[B, S, G, K]`, S ≥ T.
        v: `[B, S, G, V]`.
        bias: `[B, S, M]`; −inf hides a key.
        expires: e, `[B, S, M]` int32 from `expiry`.
        starts: `[S]`, where each key's document begins.
        scale: factor on q·k.
        keep: w, the most keys that are alive at once.
        chosen: r and θ, `[B, S, M]` int32: the living keys of rank r_j ≥ θ_i alone; None is all.
        before: `[B, S, M]`, the key whose lane each takes, from `predecessors`; None is the one that it displaces.

    Returns:
        `[B, T, H, V]` in float32 or float64, the dtype of q.
    """
    batch, queries, heads, _ = q.shape
    keys, units = k.shape[1], max(k.shape[2], bias.shape[2])

    def by_unit(x: Tensor) -> Tensor:
        """`[B, S, G or M, …]` → `[B·U, S, …]`: one list of live keys per unit."""
        return x.repeat_interleave(units // x.shape[2], dim=2).transpose(1, 2).flatten(0, 1)

    size = block_length(queries, keep)
    blocks = -(-queries // size)
    # The bias is one more channel of the keys, so that its gradient comes with theirs.
    gone = by_unit(expires.masked_fill(bias == float("-inf"), 0))
    bias = bias.clamp(min=HIDDEN).unsqueeze(-1).to(q.dtype)
    packed = torch.cat((by_unit(k), by_unit(bias), by_unit(v)), dim=-1)
    q = torch.cat((q * scale, q.new_ones(*q.shape[:-1], 1)), dim=-1)
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, blocks * size - queries))
    q = q.reshape(batch, blocks, size, units, heads // units, -1).permute(0, 3, 1, 2, 4, 5)
    before = None if before is None else by_unit(before)
    slots = slots_node(by_unit(expires), starts, before, min(keep, keys), keys - queries, blocks, size)
    ranks = limits = None
    if chosen is not None:
        ranks, limits = (by_unit(x) for x in chosen)
        limits = torch.nn.functional.pad(limits[:, keys - queries :], (0, blocks * size - queries)).reshape(-1, size, 1)
    rows = q.flatten(0, 2).flatten(1, 2)
    out: Tensor = _LiveAttention.apply(rows, packed, gone, slots, ranks, limits, keys - queries, size)
    out = out.reshape(batch, units, blocks, size, heads // units, -1).permute(0, 2, 3, 1, 4, 5)
    return out.reshape(batch, blocks * size, heads, -1)[:, :queries]


def block_length(queries: int, keep: int) -> int:
    """C, rows per block: gathering costs w/C keys a row, scoring w + C."""
    return min(max(64, min(keep // 2, 256)), max(queries, 1))


def live_slots(
    expires: Tensor,
    starts: Tensor,
    before: Tensor | None,
    keep: int,
    first_row: int,
    blocks: int,
    size: int,
) -> Tensor:
    """The keys that each block of queries may see: w lanes of older keys, then the block's own.

    Args:
        expires: `[R, S]` int32.
        starts: `[S]`, begin of each key's document.
        before: `[R, S]`, as of `attend_live`.
        keep: w.
        first_row: place of the first query among the keys.
        blocks: number of blocks.
        size: C, rows per block.

    Returns:
        `[R, blocks, w + C]` int64, −1 for none.
    """
    rows, keys = expires.shape
    place = torch.arange(keys, device=expires.device)
    starts = starts.long()
    if before is None:
        # successor → predecessor: who held the lane before. A key that outlives its document has no successor.
        following = expires.long()
        inside = (following < keys) & (following > place)
        inside &= starts[following.clamp(max=keys - 1)] == starts
        before = torch.arange(keys + 1, device=expires.device).repeat(rows, 1)
        before.scatter_(1, torch.where(inside, following, keys), place.expand(rows, -1))
        before = before[:, :keys]
    before = before.long()
    for _ in range((keys - 1).bit_length()):
        before = before.gather(1, before)
    lane = before - starts[before]
    # A key that expired at birth never had a lane; it goes to one behind the last.
    lane = lane.clamp(max=keep)
    born = (torch.div(place - first_row, size, rounding_mode="floor") + 1).clamp(min=0)
    table = torch.full((rows, (blocks + 1) * (keep + 1)), -1, dtype=torch.int64, device=expires.device)
    table.scatter_reduce_(1, born * (keep + 1) + lane, place.expand(rows, -1), "amax")
    newest = table.reshape(rows, blocks + 1, keep + 1).cummax(1).values[:, :blocks, :keep]
    own = first_row + torch.arange(blocks * size, device=expires.device).reshape(blocks, size)
    own = torch.where(own < keys, own, -1).expand(rows, -1, -1)
    return torch.cat((newest, own), dim=-1)


class _LiveAttention(torch.autograd.Function):
    """Softmax over gathered keys; backward forms the weights again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """q `[N, C·Q, K + 1]`, N = R·blocks; packed `[R, S, K + 1 + V]`; slots `[R, blocks, L]`; limits `[N, C, 1]`."""
        *tensors, ctx.first_row, ctx.size = arguments
        ctx.save_for_backward(*tensors)
        out: Tensor = live_node(*arguments)
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_packed = live_gradient_node(d_out, *ctx.saved_tensors, ctx.first_row, ctx.size)
        return d_q, d_packed, *[None] * 6


def _attend(q: Tensor, packed: Tensor, *arguments: Any) -> Tensor:
    plan, out = _Plan(q, packed, *arguments), _attend_room(q, packed)
    for part in plan.parts():
        weights, empty, gathered, _ = plan.weights(part)
        torch.bmm(weights, gathered[..., plan.width :], out=out[part])
        out[part].masked_fill_(empty, 0.0)
    return out


def _attend_room(q: Tensor, packed: Tensor, *others: Any) -> Tensor:
    return q.new_empty((*q.shape[:2], packed.shape[-1] - q.shape[-1]))


def _attend_gradient(d_out: Tensor, q: Tensor, packed: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    plan, d_packed = _Plan(q, packed, *arguments), packed.new_zeros(packed.shape).flatten(0, 1)
    d_q = q.new_empty(q.shape)
    for part in plan.parts():
        weights, empty, gathered, index = plan.weights(part)
        d_rows = d_out[part].masked_fill(empty, 0.0)
        d_gathered = torch.empty_like(gathered)
        d_gathered[..., plan.width :] = weights.transpose(1, 2) @ d_rows
        d_scores = torch.bmm(d_rows, gathered[..., plan.width :].transpose(1, 2))
        d_scores.sub_((d_scores * weights).sum(-1, keepdim=True)).mul_(weights)
        torch.bmm(d_scores, gathered[..., : plan.width], out=d_q[part])
        d_gathered[..., : plan.width] = d_scores.transpose(1, 2) @ q[part]
        d_packed.index_add_(0, index.flatten(), d_gathered.flatten(0, 1))
    return d_q, d_packed.view(packed.shape)


class _Plan:
    """What the forward and the backward pass of `_LiveAttention` have in common."""

    def __init__(
        self,
        q: Tensor,
        packed: Tensor,
        expires: Tensor,
        slots: Tensor,
        ranks: Tensor | None,
        limits: Tensor | None,
        first_row: int,
        size: int,
    ) -> None:
        rows, blocks, length = slots.shape
        self.q, self.size, self.width = q, size, q.shape[-1]
        self.flat = packed.flatten(0, 1)
        offset = torch.arange(rows, device=q.device).reshape(rows, 1, 1) * packed.shape[1]
        none = slots < 0
        self.index = (slots.clamp(min=0) + offset).reshape(rows * blocks, length)
        self.expires = expires.flatten()[self.index].masked_fill_(none.reshape(rows * blocks, length), 0)
        self.limits = limits
        self.ranks = None if ranks is None else ranks.flatten()[self.index]
        self.row = first_row + torch.arange(blocks * size, dtype=torch.int32, device=q.device).reshape(
            blocks, 1, size, 1
        )
        self.row = self.row.expand(blocks, 1, size, 1).repeat(rows, 1, 1, 1).squeeze(1)
        self.future = torch.ones((size, size), dtype=torch.bool, device=q.device).triu(1)

    def parts(self) -> list[slice]:
        """Slices of the blocks whose scores are formed together."""
        most = SCORES_AT_ONCE.get(self.q.device.type, SCORES_AT_ONCE["cpu"])
        step = max(1, most // max(1, self.q.shape[1] * self.index.shape[1]))
        return [slice(a, a + step) for a in range(0, len(self.q), step)]

    def weights(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Softmax weights `[n, C·Q, L]`, rows without keys `[n, C·Q, 1]`, gathered rows and their index."""
        q, index = self.q[part], self.index[part]
        gathered = self.flat.index_select(0, index.flatten()).reshape(*index.shape, -1)
        scores = torch.bmm(q, gathered[..., : self.width].transpose(1, 2))
        hidden = self.expires[part].unsqueeze(1) <= self.row[part]
        hidden[..., -self.size :] |= self.future
        if self.ranks is not None and self.limits is not None:
            hidden |= self.ranks[part].unsqueeze(1) < self.limits[part]
        group = q.shape[1] // self.size
        scores.unflatten(1, (self.size, group)).masked_fill_(hidden.unsqueeze(2), HIDDEN * 1e3)
        empty = hidden.all(-1).repeat_interleave(group, dim=1).unsqueeze(-1)
        return scores.softmax(-1), empty, gathered, index


slots_node = register_node(
    "dynamic_mask_slots(Tensor expires, Tensor starts, Tensor? before, SymInt keep, SymInt first_row, SymInt blocks, "
    "SymInt size) -> Tensor",
    live_slots,
    lambda expires, starts, before, keep, first_row, blocks, size: expires.new_empty(
        len(expires), blocks, keep + size, dtype=torch.int64
    ),
)
_ARGUMENTS = (
    "Tensor q, Tensor packed, Tensor expires, Tensor slots, Tensor? ranks, Tensor? limits, SymInt first_row, "
    "SymInt size"
)
live_node = register_node(f"dynamic_mask_live({_ARGUMENTS}) -> Tensor", _attend, _attend_room)
live_gradient_node = register_node(
    f"dynamic_mask_live_gradient(Tensor d_out, {_ARGUMENTS}) -> (Tensor d_q, Tensor d_packed)",
    _attend_gradient,
    lambda d_out, q, packed, *others: (q.new_empty(q.shape), packed.new_empty(packed.shape)),
)
