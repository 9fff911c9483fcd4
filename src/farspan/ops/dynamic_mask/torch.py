"""The fast forms of dynamic mask attention: live keys by blocks, or fused kernels with the bias as one more channel."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype
from farspan.ops.dynamic_mask.blocks import HIDDEN, attend_live
from farspan.ops.dynamic_mask.expiry import expiry, ranks_of
from farspan.ops.dynamic_mask.reference import dynamic_mask_attention_reference, key_blocks, smoothed
from farspan.ops.softmax.torch import softmax_attention_sdpa

# Entries of a score matrix so small that the definition is the fastest form.
SHORT = 128 * 128


def dynamic_mask_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    ranking: Tensor | None,
    scale: float,
    select: str,
    keep: int,
    block_size: int | None,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `dynamic_mask_attention`. Three forms, the first that fits:

    - every key chosen once for all queries, or all keys: the bias of the others is lowered, fused kernels do the rest;
    - `topk_causal` without a window: each key's expiry, then blocks of live keys, O(T·w);
    - all else, short sequences and a single query: the definition with its masks, O(T·S) memory.
    """
    queries, keys = q.shape[1], k.shape[1]
    if select == "topk_causal" and not causal and window is None:
        select = "topk_global"
    if select.startswith("topk") and keep >= keys and block_size is None:
        select = "none"
    fast = bias.dim() == 3 and queries > 1 and queries * keys > SHORT
    once = select != "topk_causal" and not (window is not None and key_mask is not None)
    if fast and once:
        chosen = _chosen(bias, bias if ranking is None else ranking, select, keep, block_size, key_mask, cu_seqlens)
        return _fused(q, k, v, bias, chosen, scale, causal, window, key_mask, cu_seqlens)
    if fast and causal and window is None and block_size is None:
        return _live(q, k, v, bias, bias if ranking is None else ranking, scale, keep, key_mask, cu_seqlens)
    return dynamic_mask_attention_reference(
        q,
        k,
        v,
        bias,
        ranking=ranking,
        scale=scale,
        select=select,
        keep=keep,
        block_size=block_size,
        causal=causal,
        window=window,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
    )


def _live(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    ranking: Tensor,
    scale: float,
    keep: int,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    wide = compute_dtype(q, k, v)
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask.unsqueeze(-1), float("-inf"))
    expires = expiry(ranking.masked_fill(bias == float("-inf"), float("-inf")), keep, cu_seqlens)
    starts = torch.zeros(k.shape[1], dtype=torch.int32, device=k.device)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1][varlen.sequence_ids(cu_seqlens)]
    out = attend_live(q.to(wide), k.to(wide), v.to(wide), bias.to(wide), expires, starts, scale=scale, keep=keep)
    return out.to(v.dtype)


def _chosen(
    bias: Tensor,
    ranking: Tensor,
    select: str,
    keep: int,
    block_size: int | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The keys that a selection without regard to the query leaves, `[B, S, M]` bool."""
    batch, keys, heads = bias.shape
    bias = bias.detach()
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask.unsqueeze(-1), float("-inf"))
    chosen = bias > (0.0 if select == "relu" else float("-inf"))
    if select == "topk_global":
        ends = torch.full((keys,), keys, dtype=torch.int32, device=bias.device)
        if cu_seqlens is not None:
            ends = cu_seqlens[1:][varlen.sequence_ids(cu_seqlens)]
        ranks = ranks_of(ranking.masked_fill(bias == float("-inf"), float("-inf")), cu_seqlens)
        chosen = chosen & (ranks >= ends - keep).reshape(batch, heads, keys).transpose(1, 2)
    if block_size is not None:
        blocks = key_blocks(keys, block_size, key_mask, cu_seqlens, bias.device)
        chosen = smoothed(chosen.transpose(1, 2).unsqueeze(2), blocks).squeeze(2).transpose(1, 2)
        chosen = chosen & (bias > float("-inf"))
    return chosen


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    chosen: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The bias rides along as key channels that meet a 1 in the query: one call of the fused kernels, no mask."""
    queries, heads = q.shape[1:3]
    bias_heads, units, width = bias.shape[2], max(k.shape[2], bias.shape[2]), v.shape[-1]
    lowest = max(HIDDEN, torch.finfo(q.dtype).min / 2)
    bias = bias.masked_fill(~chosen, lowest).clamp(min=lowest)
    added = _in_parts(bias, q.dtype).repeat_interleave(units // bias_heads, dim=2)
    k, v = (x.repeat_interleave(units // x.shape[2], dim=2) for x in (k, v))
    q = torch.cat((q.new_ones(*q.shape[:-1], added.shape[-1]), q * scale), dim=-1)
    k = torch.cat((added, k), dim=-1)
    # The fused kernels want one width, the fast ones a multiple of 8.
    wide = -(-max(k.shape[-1], width) // 8) * 8
    q, k, v = (pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    out = softmax_attention_sdpa(
        q, k, v, scale=1.0, causal=causal, window=window, key_mask=key_mask, cu_seqlens=cu_seqlens
    )[..., :width]
    empty = ~_sees_any(chosen, queries, causal, window, cu_seqlens)
    return out.masked_fill(empty.repeat_interleave(heads // bias_heads, dim=2).unsqueeze(-1), 0.0)


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


def _sees_any(chosen: Tensor, queries: int, causal: bool, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """Whether a query sees at least one chosen key, `[B, T, M]` bool, from running counts."""
    keys = chosen.shape[1]
    row = torch.arange(keys - queries, keys, device=chosen.device)
    first, last = torch.zeros_like(row), torch.full_like(row, keys)
    if cu_seqlens is not None:
        document = varlen.sequence_ids(cu_seqlens)[row]
        first, last = cu_seqlens[:-1].long()[document], cu_seqlens[1:].long()[document]
    if causal:
        last = row + 1
    if window is not None:
        first = torch.maximum(first, row + 1 - window)
        last = torch.minimum(last, row + window)
    counts = pad(chosen.cumsum(1, dtype=torch.int32), (0, 0, 1, 0))
    return counts[:, last] > counts[:, first]
