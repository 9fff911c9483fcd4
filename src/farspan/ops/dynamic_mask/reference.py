"""The definition of dynamic mask attention with explicit masks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype
from farspan.ops.softmax.reference import visible


@dataclass(frozen=True)
class Selection:
    """Which keys a query may attend to; the fields are the arguments of `dynamic_mask_attention`."""

    select: str = "topk_causal"
    keep: int = 2048
    block_size: int | None = None
    causal: bool = True
    window: int | None = None
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    ranking: Tensor | None = None


def dynamic_mask_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float, selection: Selection
) -> Tensor:
    """See `dynamic_mask_attention`; O(T·S) memory."""
    return attend(q, k, v, bias, kept_keys(bias, q.shape[1], selection), scale)


def kept_keys(bias: Tensor, queries: int, selection: Selection) -> Tensor:
    """Which keys each query attends to, `[B, M, T, S]` bool: those it may see and that were chosen.

    Args:
        bias: `[B, S, M]` or `[B, M, T, S]`.
        queries: T.
        selection: the options.
    """
    select, block_size, ranking = selection.select, selection.block_size, selection.ranking
    key_mask, cu_seqlens = selection.key_mask, selection.cu_seqlens
    by_row = _by_row(bias.detach())
    keys = by_row.shape[-1]

    def visible_keys(causal: bool, window: int | None) -> Tensor:
        seen = visible(
            queries,
            keys,
            causal=causal,
            window=window,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            device=bias.device,
        )
        return seen.unsqueeze(1) & (by_row > float("-inf"))

    seen = visible_keys(selection.causal, selection.window)
    candidates = visible_keys(causal=False, window=None) if select == "topk_global" else seen
    chosen = candidates
    if select == "relu":
        chosen = by_row > 0
    elif select != "none":
        ranked = by_row if ranking is None else _by_row(ranking.detach())
        chosen = best(ranked.expand(*candidates.shape[:2], queries, keys), candidates, selection.keep)
    if block_size is not None:
        blocks = key_blocks(keys, block_size, key_mask, cu_seqlens, bias.device)
        chosen = smoothed(chosen.expand_as(seen), blocks)
    return seen & chosen


def best(values: Tensor, candidates: Tensor, keep: int) -> Tensor:
    """The `keep` candidates with the largest values along the last dimension; of equal ones, the later.

    Args:
        values: `[..., S]`.
        candidates: `[..., S]` bool.
        keep: how many; all where there are fewer.

    Returns:
        `[..., S]` bool.
    """
    # Candidates behind all others, by value, equal ones by place: two stable sorts.
    by_value = values.argsort(dim=-1, stable=True)
    order = by_value.gather(-1, candidates.gather(-1, by_value).to(torch.int8).argsort(dim=-1, stable=True))
    chosen = torch.zeros_like(candidates).scatter(-1, order[..., max(values.shape[-1] - keep, 0) :], True)
    return chosen & candidates


def key_blocks(
    keys: int, block_size: int, key_mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """The block of every key, `[B or 1, S]` int64; −1 for padding.

    Blocks count real keys and restart with every document.
    """
    if cu_seqlens is not None:
        first = varlen.position_ids(cu_seqlens, keys) % block_size == 0
        return first.long().cumsum(0).unsqueeze(0) - 1
    if key_mask is None:
        return (torch.arange(keys, device=device) // block_size).unsqueeze(0)
    return ((key_mask.long().cumsum(-1) - 1) // block_size).masked_fill(~key_mask, -1)


def smoothed(chosen: Tensor, blocks: Tensor) -> Tensor:
    """Keeps a whole block of keys where more than half of it was chosen, and drops it otherwise.

    Args:
        chosen: `[B, M, T, S]` bool.
        blocks: `[B or 1, S]` from `key_blocks`.

    Returns:
        `[B, M, T, S]` bool.
    """
    index = (blocks + 1)[:, None, None, :].expand(chosen.shape)
    votes = torch.where(chosen, 1, -1)
    total = torch.zeros((*chosen.shape[:-1], chosen.shape[-1] + 1), dtype=votes.dtype, device=chosen.device)
    return (total.scatter_add(-1, index, votes) > 0).gather(-1, index) & (index > 0)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor, scale: float) -> Tensor:
    """softmax(scale · q·k + bias) v over the kept keys; a row without any gives 0.

    Args:
        q, k, v, bias: as in `dynamic_mask_attention`.
        kept: `[B, M, T, S]` bool.
        scale: factor on q·k.

    Returns:
        `[B, T, H, V]` in v's dtype.
    """
    wide = compute_dtype(q, k, v)
    heads, key_heads, bias_heads = q.shape[2], k.shape[2], kept.shape[1]
    grouped = q.to(wide).unflatten(2, (key_heads, heads // key_heads))
    scores = torch.einsum("btgrk,bsgk->bgrts", grouped, k.to(wide)).flatten(1, 2) * scale
    added = _by_row(bias).to(wide).masked_fill(~kept, 0.0)
    scores = scores.unflatten(1, (bias_heads, heads // bias_heads)) + added.unsqueeze(2)
    empty = ~kept.any(-1, keepdim=True).unsqueeze(2)
    scores = scores.masked_fill(~(kept.unsqueeze(2) | empty), float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0).flatten(1, 2)
    weights = weights.unflatten(1, (key_heads, heads // key_heads))
    return torch.einsum("bgrts,bsgv->btgrv", weights, v.to(wide)).flatten(2, 3).to(v.dtype)


def _by_row(bias: Tensor) -> Tensor:
    """`[B, M, T or 1, S]`."""
    return bias if bias.dim() == 4 else bias.transpose(1, 2).unsqueeze(2)
