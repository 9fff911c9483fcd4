"""The formula of dilated attention with explicit score matrices."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from farspan.ops._contract import compute_dtype
from farspan.ops.dilated.patterns import DilatedSettings, Span, ceil_div, fill, head_offsets, sequences
from farspan.ops.dilated.rotation import rotate

PatternOutputs = Callable[[Tensor, Tensor, Tensor, DilatedSettings, Sequence[Span]], tuple[Tensor, Tensor]]


def dilated_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, cu_seqlens: Tensor | None = None
) -> Tensor:
    """See `dilated_attention`; O(P·T²) memory for P patterns."""
    outs, lses = with_zero_keys(pattern_outputs, q, k, v, settings, sequences(cu_seqlens, q.shape[1]))
    return mixture(outs, lses, settings.detach_mixture_weights).to(v.dtype)


def pattern_outputs(
    q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, spans: Sequence[Span]
) -> tuple[Tensor, Tensor]:
    """Each pattern's own attention, without rows that fill segments.

    Returns:
        Outputs `[P, B, T, H, V]`, 0 where the pattern skips a row, and log-sum-exps `[P, B, T, H]`, −∞ there.
    """
    wide, (length, heads), device = compute_dtype(q, k, v), q.shape[1:3], q.device
    queries, keys, values = (x.to(wide).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v))
    sequence = torch.full((length,), -1, device=device)
    place, whole = torch.zeros_like(sequence), torch.zeros_like(sequence)
    for index, (start, end) in enumerate(spans):
        sequence[start:end] = index
        place[start:end] = torch.arange(end - start, device=device)
        whole[start:end] = end - start
    distance = place[None, :] - place[:, None]
    outs, lses = [], []
    for segment, dilation in settings.patterns:
        inside = place % segment
        offsets = torch.tensor(head_offsets(settings.head_offset, heads, dilation), device=device)
        taken = inside % dilation == offsets[:, None]
        visible = (sequence[:, None] == sequence) & (place[:, None] // segment == place // segment)
        if settings.causal:
            visible = visible & (distance <= 0)
        visible = visible & taken[:, :, None] & taken[:, None, :]
        turned_q, turned_k = queries, keys
        centred = (inside - (whole.clamp(max=segment) - 1) / 2).unsqueeze(-1)
        tables = settings.rotations(centred, centred)
        if tables is not None:
            turned_q, turned_k = rotate(queries, tables[0]), rotate(keys, tables[1])
        scores = torch.einsum("bthk,bshk->bhts", turned_q, turned_k) * settings.scale
        if settings.distance_bias is not None:
            centre = settings.distance_bias.shape[1] // 2
            scores = scores + settings.distance_bias.to(wide)[:, (centre + distance).clamp(0, 2 * centre)]
        out, lse = attend(scores.masked_fill(~visible, float("-inf")), values.transpose(1, 2), settings.dropout)
        outs.append(out.transpose(1, 2))
        lses.append(lse.transpose(1, 2))
    return torch.stack(outs), torch.stack(lses)


def with_zero_keys(
    compute: PatternOutputs, q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, spans: Sequence[Span]
) -> tuple[Tensor, Tensor]:
    """`compute` with torchscale's filling of ragged segments where the settings ask for it.

    The last segment is filled with rows of zeros to w, then each to ⌈w/r⌉·r. Outputs are read off in the *filled*
    order: behind the first segment, row p is not that of token p unless r divides w.
    """
    if not settings.filling(spans):
        return compute(q, k, v, settings, spans)
    outs, lses = [], []
    for segment, dilation in settings.patterns:
        parts = []
        for start, end in spans:
            width = max(1, min(segment, end - start))
            rows = ceil_div(width, dilation) * dilation
            queries, keys, values = (fill(x[:, start:end], width, rows) for x in (q, k, v))
            inner = replace(settings, patterns=((rows, dilation),), zero_keys=False)
            out, lse = compute(queries, keys, values, inner, [(0, queries.shape[1])])
            parts.append((out[:, :, : end - start], lse[:, :, : end - start]))
        outs.append(torch.cat([out for out, _ in parts], dim=2))
        lses.append(torch.cat([lse for _, lse in parts], dim=2))
    return torch.cat(outs), torch.cat(lses)


def attend(scores: Tensor, values: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp from scores that are −∞ where a key is not seen.

    Args:
        scores: `[…, c, c]`.
        values: `[…, c, V]`.
        dropout: probability of dropping a weight.

    Returns:
        `[…, c, V]`, and `[…, c]`: 0 and −∞ for a row that sees no key.
    """
    empty = scores.isneginf().all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp()
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ values, lse.masked_fill(empty, float("-inf")).squeeze(-1)


def mixture(outs: Tensor, lses: Tensor, detach: bool) -> Tensor:
    """Σ_i α_i o_i with α = softmax over patterns of their log-sum-exps: one softmax over all their keys.

    Args:
        outs: `[P, …, V]`, 0 where a pattern skips the row.
        lses: `[P, …]`, −∞ there.
        detach: whether α is a constant in backward.
    """
    weights = lses.masked_fill(lses.isneginf(), torch.finfo(lses.dtype).min).softmax(0).unsqueeze(-1)
    return ((weights.detach() if detach else weights) * outs).sum(0)
