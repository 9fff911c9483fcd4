"""Attention of one box and its gradient, through cuDNN where it serves and with formed scores for a few rows.

cuDNN reads strided views in place. Queries, keys, values, output and its gradient must share one pattern of strides:
its plans are remembered by the strides of the first three.
"""

import torch
from torch import Tensor

from farspan.ops._contract import compute_dtype

# Rows per segment from which cuDNN takes over.
SHORTEST = 64


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention within each segment and head.

    Args:
        q, k, v: `[n, h, c, K]`.
        causal: whether row i sees the rows up to i alone.
        scale: factor on the scores.

    Returns:
        `[n, h, c, K]` in the dtype of q, and the log-sum-exps, contiguous `[n, h, c]` float32 (float64 for float64).
    """
    if q.shape[2] < SHORTEST:
        scores = _scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        return (weights @ v.to(weights.dtype)).to(q.dtype), lse
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse.reshape(q.shape[:3])


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the box's share in a softmax whose output is `out` and whose log-sum-exp is `lse`.

    Args:
        d_out, q, k, v, out: `[n, h, c, K]`, of one pattern of strides.
        lse: `[n, h, c]`.
        causal, scale: as for `attend`.

    Returns:
        The gradients of q, k and v, `[n, h, c, K]` each.
    """
    if q.shape[2] < SHORTEST:
        wide = compute_dtype(q)
        queries, keys, values, given = (x.to(wide) for x in (q, k, v, d_out))
        weights = (_scores(q, k, causal, scale) - lse.unsqueeze(-1)).exp()
        delta = (given * out.to(wide)).sum(-1, keepdim=True)
        d_scores = weights * (given @ values.mT - delta) * scale
        gradients = (d_scores @ keys, d_scores.mT @ queries, weights.mT @ given)
        return tuple(x.to(q.dtype) for x in gradients)  # type: ignore[return-value]
    rows, seed = q.shape[2], torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None, rows, rows, 0.0, causal, scale=scale
    )
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    wide = compute_dtype(q)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores
