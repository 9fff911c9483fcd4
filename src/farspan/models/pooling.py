"""One state for a whole text."""

import torch
from torch import Tensor

from farspan.mixers.layout import SequenceLayout
from farspan.ops import varlen


def pool(x: Tensor, layout: SequenceLayout, how: str) -> Tensor:
    """One state for each sequence: of its first or last real token, or the mean over its real tokens.

    Args:
        x: `[B, T, D]` states of tokens.
        layout: where these tokens stand. Padding may stand anywhere.
        how: `"first"`, `"last"` or `"mean"`.

    Returns:
        `[B, D]`, or `[num_seqs, D]` where documents are packed; 0 for a sequence without real tokens.

    Example:
        >>> layout = SequenceLayout(torch.tensor([[0, 0, 1]]), padding_mask=torch.tensor([[False, True, True]]))
        >>> pool(torch.tensor([[[1.0], [2.0], [4.0]]]), layout, "mean").tolist()
        [[3.0]]
    """
    if layout.cu_seqlens is not None:
        return _pool_documents(x[0], layout.cu_seqlens, how)
    mask = layout.padding_mask
    if not x.shape[1]:
        return x.sum(1)
    if mask is None:
        return x.mean(1) if how == "mean" else x[:, 0 if how == "first" else -1]
    count = mask.sum(-1, keepdim=True)
    if how == "mean":
        return (mask.to(x.dtype).unsqueeze(1) @ x).squeeze(1) / count.clamp(min=1)
    place = mask.long().argmax(-1) if how == "first" else x.shape[1] - 1 - mask.flip(-1).long().argmax(-1)
    return x[torch.arange(len(x), device=x.device), place].masked_fill(count == 0, 0.0)


def _pool_documents(x: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    """`[N, D]` → `[num_seqs, D]`."""
    bounds = cu_seqlens.long()
    count = bounds.diff().unsqueeze(-1)
    if how == "mean":
        total = x.new_zeros(len(count), x.shape[-1]).index_add(0, varlen.sequence_ids(cu_seqlens, len(x)), x)
        return total / count.clamp(min=1)
    place = bounds[:-1] if how == "first" else bounds[1:] - 1
    return x[place.clamp(0, len(x) - 1)].masked_fill(count == 0, 0.0)
