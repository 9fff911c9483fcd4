"""Dilated attention in time proportional to the selected pairs: each piece is a strided view, nothing is gathered.

Two forms share the pieces. The fused one runs PyTorch's flash kernel on each piece, merges outputs through a running
log-sum-exp, and in backward runs the kernel's backward with the *merged* output and the *global* log-sum-exp: since
the mixture is one softmax over all keys, that is its exact gradient, and q, k, v, the output and one number per row
and head are all that is kept. The other form keeps the patterns apart. It serves what needs them apart (constant
mixture weights, filled segments), and forms the scores where the kernel cannot: dropout, a bias that is learnt, a
mixture with a gradient, V ≠ K, devices without the kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype, plain_backward, without_autocast
from farspan.ops._library import register_recomputed
from farspan.ops.dilated.patterns import DilatedSettings, Piece, Span, pieces, sequences
from farspan.ops.dilated.reference import attend, mixture, with_zero_keys
from farspan.ops.dilated.rotation import rotate

Rows = tuple[Tensor, Tensor, Tensor]


def dilated_attention_strided(
    q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, cu_seqlens: Tensor | None = None
) -> Tensor:
    """See `dilated_attention`."""
    with without_autocast(q):
        if cu_seqlens is None or not torch.compiler.is_compiling():
            return _attend(q, k, v, settings, sequences(cu_seqlens, q.shape[1]))
        s = settings
        segments, dilations = (list(numbers) for numbers in zip(*s.patterns, strict=True))
        options = s.head_offset, s.causal, float(s.scale), float(s.dropout), s.detach_mixture_weights, s.zero_keys
        tensors = q, k, v, s.distance_bias, s.frequencies, s.growth
        return _packed_node(tensors, cu_seqlens, segments, dilations, *options, random=s.dropout > 0)


def _packed(
    tensors: Sequence[Tensor], cu_seqlens: Tensor, segments: Sequence[int], dilations: Sequence[int], *options: Any
) -> Tensor:
    q, k, v, *more = tensors
    settings = DilatedSettings(tuple(zip(segments, dilations, strict=True)), *options, *more)
    return _attend(q, k, v, settings, varlen.spans(cu_seqlens))


_packed_node = register_recomputed(
    "dilated_packed",
    "int[] segments, int[] dilations, str rule, bool causal, float scale, float dropout, bool detach, bool zero_keys",
    _packed,
)


def _attend(q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, spans: Sequence[Span]) -> Tensor:
    constant_mixture = settings.detach_mixture_weights and len(settings.patterns) > 1 and _needs_grad(q, k, v)
    if _kernel_serves(q, v, settings) and not settings.filling(spans) and not constant_mixture:
        return _SharedSoftmax.apply(q, k, v, settings, spans)
    outs, lses = with_zero_keys(_by_pattern, q, k, v, settings, spans)
    return mixture(outs, lses, settings.detach_mixture_weights).to(v.dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _kernel_serves(q: Tensor, v: Tensor, settings: DilatedSettings) -> bool:
    fitting = q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and settings.dropout == 0
    return fitting and not _needs_grad(settings.distance_bias)


class _SharedSoftmax(torch.autograd.Function):
    """The fused form."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, spans: Sequence[Span]) -> Tensor:
        wide = compute_dtype(q, k, v)
        out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=wide, device=q.device)
        total = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
        for piece in pieces(settings, q.shape[2], spans):
            part, lse = _kernel(piece, _rows(piece, q, k, v, _tables(piece, settings)), settings)
            _merge(piece.view(out), piece.view(total), _laid(piece, part), _laid(piece, lse))
        out = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.settings, ctx.spans = settings, spans
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total = ctx.saved_tensors
        settings, heads = ctx.settings, q.shape[2]
        grads = [torch.zeros_like(x, dtype=total.dtype) for x in (q, k, v)]
        for piece in pieces(settings, heads, ctx.spans):
            table = _tables(piece, settings)
            rows = _rows(piece, q, k, v, table)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _flat(piece.view(grad)).to(rows[0].dtype),
                *rows,
                _flat(piece.view(out)).to(rows[0].dtype),
                _flat(piece.view(total)).contiguous(),
                0.0,
                settings.causal,
                attn_mask=_toeplitz(piece, settings, rows[0].dtype),
                scale=settings.scale,
            )
            for index, (whole, part) in enumerate(zip(grads, parts, strict=True)):
                part = _laid(piece, part).to(whole.dtype)
                if table is not None and index < 2:
                    part = rotate(part, table[index].conj())
                if whole.shape[2] == heads:
                    piece.view(whole).add_(part)
                else:
                    shared = torch.tensor(piece.key_heads(heads, whole.shape[2]), device=whole.device)
                    piece.all_heads(whole).index_add_(3, shared, part)
        return (*(x.to(like.dtype) for x, like in zip(grads, (q, k, v), strict=True)), None, None)


def _by_pattern(
    q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, spans: Sequence[Span]
) -> tuple[Tensor, Tensor]:
    """Outputs `[P, B, T, H, V]` and log-sum-exps `[P, B, T, H]` of the patterns by themselves."""
    wide, patterns = compute_dtype(q, k, v), len(settings.patterns)
    outs = [torch.zeros((*q.shape[:3], v.shape[-1]), dtype=wide, device=q.device) for _ in range(patterns)]
    lses = [torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device) for _ in range(patterns)]
    # The kernel's output has a gradient, its log-sum-exp has none.
    constant = settings.detach_mixture_weights or not _needs_grad(q, k)
    attend_piece = _kernel if constant and _kernel_serves(q, v, settings) else _scores_formed
    for piece in pieces(settings, q.shape[2], spans):
        part, lse = attend_piece(piece, _rows(piece, q, k, v, _tables(piece, settings)), settings)
        piece.view(outs[piece.pattern]).copy_(_laid(piece, part))
        piece.view(lses[piece.pattern]).copy_(_laid(piece, lse))
    return torch.stack(outs), torch.stack(lses)


def _kernel(piece: Piece, rows: Rows, settings: DilatedSettings) -> tuple[Tensor, Tensor]:
    """A piece's attention and log-sum-exp by the flash kernel."""
    part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *rows, 0.0, settings.causal, attn_mask=_toeplitz(piece, settings, rows[0].dtype), scale=settings.scale
    )
    return part, lse


def _scores_formed(piece: Piece, rows: Rows, settings: DilatedSettings) -> tuple[Tensor, Tensor]:
    """The same with the scores in memory: c² numbers per segment and head."""
    wide = compute_dtype(*rows)
    queries, keys, values = (x.to(wide) for x in rows)
    scores = queries @ keys.transpose(-2, -1) * settings.scale
    bias = _toeplitz(piece, settings, wide)
    if bias is not None:
        scores = scores + bias
    if settings.causal:
        future = torch.ones(piece.rows, piece.rows, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return attend(scores, values, settings.dropout)


def _flat(rows: Tensor) -> Tensor:
    """`[B, n, c, h, …]` → `[B·n, h, c, …]`."""
    return rows.flatten(0, 1).transpose(1, 2)


def _laid(piece: Piece, x: Tensor) -> Tensor:
    """The inverse of `_flat`."""
    return x.transpose(1, 2).unflatten(0, (-1, piece.count))


def _rows(piece: Piece, q: Tensor, k: Tensor, v: Tensor, table: tuple[Tensor, Tensor] | None) -> Rows:
    """Queries, keys and values of a piece, `[B·n, h, c, K or V]` of one dtype, turned by their positions."""
    heads = q.shape[2]
    queries, keys, values = piece.view(q), piece.key_view(k, heads), piece.key_view(v, heads)
    if table is not None:
        queries, keys = rotate(queries, table[0]), rotate(keys, table[1])
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), values.dtype)
    return _flat(queries.to(dtype)), _flat(keys.to(dtype)), _flat(values.to(dtype))


def _tables(piece: Piece, settings: DilatedSettings) -> tuple[Tensor, Tensor] | None:
    """Rotations of a piece's queries and keys, `[c, 1, K/2]`: positions count from the middle of the segment."""
    if settings.frequencies is None:
        return None
    rows = torch.arange(piece.rows, device=settings.frequencies.device, dtype=torch.float64)
    centred = ((rows - (piece.rows - 1) / 2) * piece.dilation).unsqueeze(-1)
    return settings.rotations(centred, centred)


def _toeplitz(piece: Piece, settings: DilatedSettings, dtype: torch.dtype) -> Tensor | None:
    """The bias of a piece, `[1, h, c, c]`: entry (a, b) belongs to the distance r·(b − a)."""
    if settings.distance_bias is None:
        return None
    centre, reach = settings.distance_bias.shape[1] // 2, (piece.rows - 1) * piece.dilation
    line = settings.distance_bias[piece.heads, centre - reach : centre + reach + 1 : piece.dilation]
    # Row a is the window that starts c − 1 − a entries in.
    return line.unfold(1, piece.rows, 1).flip(1).unsqueeze(0).to(dtype)


def _merge(out: Tensor, total: Tensor, part: Tensor, lse: Tensor) -> None:
    """Takes a piece's output into the running mixture, in place."""
    joined = torch.logaddexp(total, lse)
    out.mul_((total - joined).exp().unsqueeze(-1)).add_(part * (lse - joined).exp().unsqueeze(-1))
    total.copy_(joined)
