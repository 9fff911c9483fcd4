"""Softmax attention through PyTorch's fused kernels, never with a T×T mask where one can be avoided."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from farspan.ops import varlen
from farspan.ops._library import register_recomputed
from farspan.ops.softmax.reference import visible

# Numbers of one tensor beyond which the backward passes of cuDNN and of flash attention address wrong ones.
_MOST_NUMBERS = 1 << 31


def softmax_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """See `softmax_attention`. Packed documents run one after another, windows in blocks of `window` queries."""
    if cu_seqlens is None:
        return _attend(q, k, v, scale, causal, window, key_mask, dropout)
    if not torch.compiler.is_compiling():
        return _packed((q, k, v), cu_seqlens, scale, causal, window, dropout)
    if torch.is_autocast_enabled(q.device.type):  # which reaches PyTorch's own operators alone
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return _packed_node((q, k, v), cu_seqlens, float(scale), causal, window, float(dropout), random=dropout > 0)


def _packed(
    tensors: Sequence[Tensor], cu_seqlens: Tensor, scale: float, causal: bool, window: int | None, dropout: float
) -> Tensor:
    """Documents one after another."""
    q, k, v = tensors
    pieces = [
        _attend(q[:, a:b], k[:, a:b], v[:, a:b], scale, causal, window, None, dropout)
        for a, b in varlen.spans(cu_seqlens)
        if b > a
    ]
    return torch.cat(pieces, dim=1) if pieces else _sdpa(q, k, v, scale)


_packed_node = register_recomputed("softmax_packed", "float scale, bool causal, int? window, float dropout", _packed)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    dropout: float,
) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    if window is not None and window >= keys:
        window = None
    if key_mask is None and window is None and (not causal or queries == keys or queries == 1):
        return _sdpa(q, k, v, scale, causal=causal and bool(queries > 1), dropout=dropout)
    if key_mask is None and window is not None and causal and queries == keys:
        return _windowed(q, k, v, scale, window, dropout)
    seen = visible(queries, keys, causal=causal, window=window, key_mask=key_mask, cu_seqlens=None, device=q.device)
    # Fused kernels return NaN for a row without keys: let it see everything, then set it to 0.
    empty = ~seen.any(-1, keepdim=True)
    out = _sdpa(q, k, v, scale, mask=(seen | empty).unsqueeze(1), dropout=dropout)
    return out.masked_fill(empty.unsqueeze(-1), 0.0)


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, dropout: float) -> Tensor:
    """Causal attention to the last `window` keys in O(T·window): each block of queries sees two blocks of keys."""
    batch, length = q.shape[:2]
    blocks = -(-length // window)
    fill = blocks * window - length
    # [B·blocks, window, H, K] queries against [B·blocks, 2·window, G, K] keys: the previous block and their own.
    q = pad(q, (0, 0, 0, 0, 0, fill)).reshape(batch * blocks, window, *q.shape[2:])

    def with_previous(x: Tensor) -> Tensor:
        x = pad(x, (0, 0, 0, 0, window, fill)).unflatten(1, (blocks + 1, window))
        return torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1)

    row = torch.arange(window, device=q.device).unsqueeze(1)
    column = torch.arange(2 * window, device=q.device).unsqueeze(0)
    inside = (column > row) & (column <= row + window)
    first = inside & (column >= window)
    mask = inside.expand(batch, blocks, -1, -1).clone()
    mask[:, 0] = first
    mask = mask.reshape(batch * blocks, 1, window, 2 * window)
    out = _sdpa(q, with_previous(k), with_previous(v), scale, mask=mask, dropout=dropout)
    return out.reshape(batch, blocks * window, *out.shape[2:])[:, :length]


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """One call of PyTorch's attention, which chooses the kernel (see `softmax_attention`), or several for many rows."""
    largest = max(x.numel() for x in (q, k, v))
    if largest > _MOST_NUMBERS and len(q) > 1:
        most = max(1, _MOST_NUMBERS // (largest // len(q)))
        parts = [slice(first, first + most) for first in range(0, len(q), most)]
        masks = [mask if mask is None or len(mask) == 1 else mask[rows] for rows in parts]
        pieces = zip(parts, masks, strict=True)
        return torch.cat([_sdpa(q[x], k[x], v[x], scale, some, causal, dropout) for x, some in pieces])
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return dense_gradient(out.transpose(1, 2))


def dense_gradient(out: Tensor) -> Tensor:
    """The same, to be differentiated by cuDNN, which reads a gradient with a stride of 0 (of `out.sum()`) wrongly."""
    dense: Tensor = _DenseGradient.apply(out) if out.is_cuda and out.requires_grad else out
    return dense


class _DenseGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass  # nothing is kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient.contiguous() if 0 in gradient.stride() else gradient
