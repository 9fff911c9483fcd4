"""The fast forms of dynamic mask attention: live keys by blocks, or fused kernels with the bias as one more channel."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype
from farspan.ops.dynamic_mask.blocks import HIDDEN, attend_live
from farspan.ops.dynamic_mask.expiry import (
    expiry,
    in_blocks,
    in_window,
    lanes_of_blocks,
    order_of,
    predecessors,
    ranks_of,
)
from farspan.ops.dynamic_mask.limits import SHORT, drops_most, most_seen
from farspan.ops.dynamic_mask.reference import Selection, dynamic_mask_attention_reference, key_blocks, smoothed
from farspan.ops.softmax.torch import softmax_attention_sdpa

# Scores of the definition that are formed at once; their backward pass forms them again.
DEFINED_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 28}


def dynamic_mask_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float, selection: Selection
) -> Tensor:
    """See `dynamic_mask_attention`. Four forms, the first that fits:

    - causal top-w selections: each key's expiry, then blocks of live keys, O(T·w), or O(T·window);
    - w keys that every query sees: these alone, O(T·w);
    - every key chosen once for all queries, or all keys: the bias of the others is lowered, fused kernels do the rest;
    - all else, short sequences and a single query: the definition with its masks, some rows at a time if causal.
    """
    queries, keys = q.shape[1], k.shape[1]
    select, window, smooth = selection.select, selection.window, selection.block_size is not None
    if select == "topk_causal" and not selection.causal and window is None:
        select = "topk_global"
    if select.startswith("topk") and selection.keep >= most_seen(keys, selection) and not smooth:
        select = "none"
    selection = replace(selection, select=select)
    fast = bias.dim() == 3 and queries > 1 and queries * keys > SHORT
    plain = window is None and not smooth
    few = select == "topk_global" and plain and drops_most(keys, selection)
    if fast and few and selection.causal:
        return _live(q, k, v, bias, scale, selection)
    if fast and few and selection.cu_seqlens is None:
        return _gathered(q, k, v, bias, scale, selection)
    unpadded = window is None or selection.key_mask is None
    if fast and select != "topk_causal" and unpadded:
        return _fused(q, k, v, bias, scale, selection)
    alone = plain or (selection.key_mask is None and not (smooth and window is not None))
    if fast and select == "topk_causal" and selection.causal and alone:
        return _live(q, k, v, bias, scale, selection)
    return _defined(q, k, v, bias, scale, selection)


def _live(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, selection: Selection) -> Tensor:
    wide, cu_seqlens = compute_dtype(q, k, v), selection.cu_seqlens
    starts = torch.zeros(k.shape[1], dtype=torch.int32, device=k.device)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1][varlen.sequence_ids(cu_seqlens, k.shape[1])]
    bias, keep, window, size = candidates(bias, selection), selection.keep, selection.window, selection.block_size
    ranking = ranking_of(bias, selection)
    chosen: list[Tensor] | None = None
    before = None
    if window is not None:
        expires, *chosen = in_window(ranking, keep, window, cu_seqlens)
        keep = window
    else:
        expires = expiry(ranking, keep, cu_seqlens)
    if size is not None:
        expires, *chosen = in_blocks(expires.masked_fill(bias.isneginf(), 0), size, cu_seqlens)
        keep = lanes_of_blocks(keep, size, k.shape[1])
        before = predecessors(expires.transpose(1, 2), keep, starts).transpose(1, 2)
    wide_q, wide_k, wide_v, wide_bias = (x.to(wide) for x in (q, k, v, bias))
    out = attend_live(
        wide_q, wide_k, wide_v, wide_bias, expires, starts, scale=scale, keep=keep, chosen=chosen, before=before
    )
    return out.to(v.dtype)


def _gathered(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, selection: Selection) -> Tensor:
    bias = without_padding(bias, selection)
    units = max(k.shape[2], bias.shape[2])
    order = order_of(ranking_of(bias.detach(), selection))[:, -selection.keep :]
    place = order.unflatten(0, (len(bias), -1)).transpose(1, 2).repeat_interleave(units // bias.shape[2], dim=2)

    def taken(x: Tensor) -> Tensor:
        """`[B, S, G or M, …]` → `[B, w, U, …]`."""
        index = place.reshape(*place.shape, *[1] * (x.dim() - 3)).expand(*place.shape, *x.shape[3:])
        return x.repeat_interleave(units // x.shape[2], dim=2).gather(1, index)

    alone = replace(selection, select="none", key_mask=None, ranking=None)
    return _fused(q, taken(k), taken(v), taken(bias), scale, alone)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, selection: Selection) -> Tensor:
    """The bias rides along as key channels that meet a 1 in the query: one call of the fused kernels, no mask."""
    heads, bias_heads = q.shape[2], bias.shape[2]
    units, width = max(k.shape[2], bias_heads), v.shape[-1]
    chosen = _chosen(without_padding(bias.detach(), selection), selection)
    lowest = max(HIDDEN, torch.finfo(q.dtype).min / 2)
    bias = bias.masked_fill(~chosen, lowest).clamp(min=lowest)
    added = _in_parts(bias, q.dtype).repeat_interleave(units // bias_heads, dim=2)
    empty = ~_sees_any(chosen, q.shape[1], selection)
    k, v = (x.repeat_interleave(units // x.shape[2], dim=2) for x in (k, v))
    q = torch.cat((q.new_ones(*q.shape[:-1], added.shape[-1]), q * scale), dim=-1)
    k = torch.cat((added, k), dim=-1)
    # The fused kernels want one width, the fast ones a multiple of 8.
    wide = -(-max(k.shape[-1], width) // 8) * 8
    q, k, v = (pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    out = softmax_attention_sdpa(
        q,
        k,
        v,
        scale=1.0,
        causal=selection.causal,
        window=selection.window,
        key_mask=selection.key_mask,
        cu_seqlens=selection.cu_seqlens,
    )
    return out[..., :width].masked_fill(empty.repeat_interleave(heads // bias_heads, dim=2).unsqueeze(-1), 0.0)


def _defined(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, selection: Selection) -> Tensor:
    """The definition; rows that look at nothing behind them go in pieces."""
    queries, past = q.shape[1], k.shape[1] - q.shape[1]
    most = DEFINED_AT_ONCE.get(q.device.type, DEFINED_AT_ONCE["cpu"])
    size = max(1, most // max(1, k.shape[1] * q.shape[2] * q.shape[0]))
    ahead = not selection.causal or selection.select == "topk_global" or selection.block_size is not None
    if ahead or size >= queries:
        return dynamic_mask_attention_reference(q, k, v, bias, scale=scale, selection=selection)

    def rows(first: int, end: int) -> Tensor:
        keys = past + end
        cut = (slice(None), slice(keys)) if bias.dim() == 3 else (..., slice(first, end), slice(keys))
        mask, ranking = selection.key_mask, selection.ranking
        part = replace(
            selection,
            key_mask=None if mask is None else mask[:, :keys],
            ranking=None if ranking is None else ranking[cut],
        )
        tensors = q[:, first:end], k[:, :keys], v[:, :keys], bias[cut]
        call = partial(dynamic_mask_attention_reference, scale=scale, selection=part)
        if not torch.is_grad_enabled():
            return call(*tensors)
        out: Tensor = checkpoint(call, *tensors, use_reentrant=False, preserve_rng_state=False)
        return out

    return torch.cat([rows(first, min(first + size, queries)) for first in range(0, queries, size)], dim=1)


def without_padding(bias: Tensor, selection: Selection) -> Tensor:
    """−inf at padding."""
    mask = selection.key_mask
    return bias if mask is None else bias.masked_fill(~mask.unsqueeze(-1), float("-inf"))


def candidates(bias: Tensor, selection: Selection) -> Tensor:
    """−inf at padding, and at what `topk_global` leaves out: of the rest, at most w, a causal top-w drops nothing."""
    if selection.select == "topk_global":
        return bias.masked_fill(~_chosen(without_padding(bias.detach(), selection), selection), float("-inf"))
    return without_padding(bias, selection)


def ranking_of(bias: Tensor, selection: Selection) -> Tensor:
    """What the keys are ranked by, with hidden ones last: behind real ones that rank −inf."""
    ranking = selection.ranking
    if ranking is None:
        return bias
    return ranking.clamp(min=torch.finfo(ranking.dtype).min).masked_fill(bias == float("-inf"), float("-inf"))


def _chosen(bias: Tensor, selection: Selection) -> Tensor:
    """The keys that a selection without regard to the query leaves, `[B, S, M]` bool."""
    batch, keys, heads = bias.shape
    key_mask, cu_seqlens = selection.key_mask, selection.cu_seqlens
    real = bias > float("-inf")
    chosen = bias > 0 if selection.select == "relu" else real
    if selection.select == "topk_global":
        ends = torch.full((keys,), keys, dtype=torch.int32, device=bias.device)
        if cu_seqlens is not None:
            ends = cu_seqlens[1:][varlen.sequence_ids(cu_seqlens, keys)]
        best = ranks_of(ranking_of(bias, selection), cu_seqlens) >= ends - selection.keep
        chosen = chosen & best.reshape(batch, heads, keys).transpose(1, 2)
    if selection.block_size is not None:
        blocks = key_blocks(keys, selection.block_size, key_mask, cu_seqlens, bias.device)
        chosen = smoothed(chosen.transpose(1, 2).unsqueeze(2), blocks).squeeze(2).transpose(1, 2) & real
    return chosen


def _in_parts(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, S, M]` as `[B, S, M, P]` in `dtype`: numbers that sum to the bias, with its gradient on the first."""
    first = bias.to(dtype)
    if dtype.itemsize >= 4:
        return first.unsqueeze(-1)
    parts, rest = [first], bias.detach() - first.detach().to(bias.dtype)
    for _ in range(2):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].to(rest.dtype)
    return torch.stack(parts, dim=-1)


def _sees_any(chosen: Tensor, queries: int, selection: Selection) -> Tensor:
    """Whether a query sees at least one chosen key, `[B, T, M]` bool, from running counts."""
    cu_seqlens, window = selection.cu_seqlens, selection.window
    keys = chosen.shape[1]
    row = torch.arange(keys - queries, keys, device=chosen.device)
    first, last = torch.zeros_like(row), torch.full_like(row, keys)
    if cu_seqlens is not None:
        document = varlen.sequence_ids(cu_seqlens, keys)[row]
        first, last = cu_seqlens[:-1].long()[document], cu_seqlens[1:].long()[document]
    if selection.causal:
        last = row + 1
    if window is not None:
        first = torch.maximum(first, row + 1 - window)
        last = torch.minimum(last, row + window)
    counts = pad(chosen.cumsum(1, dtype=torch.int32), (0, 0, 1, 0))
    return counts[:, last] > counts[:, first]
