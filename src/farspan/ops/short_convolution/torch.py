"""The short convolution as W shifted multiply-adds in the layout `[B, T, D]`, stretch by stretch.

No transposition and no unfolded copy: a stretch that fits the cache is read once, and its W products are summed there.
On a CPU this is three to six times faster than a grouped convolution, forward and backward, also in bfloat16.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype, plain_backward
from farspan.ops._library import register_node

# Numbers that are worked on at once: on a CPU what the caches hold, on a GPU everything that usually comes.
STRETCH = {False: 1 << 17, True: 1 << 28}


def short_convolution_shifted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The fast form of the short convolution; arguments and results as the reference's."""
    width = weight.shape[1]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = x.new_zeros(sequences, x.shape[2], width)
    initial_state = initial_state.to(x.dtype)
    if cu_seqlens is None and x.shape[1] == 1:
        return _one_token(x, weight, bias, activation, initial_state)
    past = initial_state.transpose(1, 2)
    if cu_seqlens is None:
        inputs = torch.cat([past, x], dim=1)
        final = inputs[:, inputs.shape[1] - width :]
        return _Shifted.apply(inputs, weight, bias, activation), final.transpose(1, 2)
    # Each document after the W rows of its own past; what the rows between documents give is not read.
    places = torch.arange(x.shape[1], device=x.device) + width * (varlen.sequence_ids(cu_seqlens, x.shape[1]) + 1)
    begins = cu_seqlens[:-1].long() + width * torch.arange(sequences, device=x.device)
    before = begins[:, None] + torch.arange(width, device=x.device)
    inputs = x.new_zeros(x.shape[1] + sequences * width, x.shape[2])
    inputs = inputs.index_copy(0, before.flatten(), past.flatten(0, 1)).index_copy(0, places, x[0])
    out = _Shifted.apply(inputs.unsqueeze(0), weight, bias, activation)
    final = inputs[before + cu_seqlens.diff().long()[:, None]]
    return out.index_select(1, places - width), final.transpose(1, 2)


def _one_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The decoding step: shift, append, dot."""
    dtype = compute_dtype(x, weight)
    state = torch.cat([state[..., 1:], x.transpose(1, 2)], dim=-1)
    out = (state.to(dtype) * weight.to(dtype)).sum(-1)
    out = out if bias is None else out + bias.to(dtype)
    out = F.silu(out) if activation == "silu" else out
    return out.unsqueeze(1).to(x.dtype), state


class _Shifted(torch.autograd.Function):
    """`[B, W + T, D]`, W rows of past and T inputs, to `[B, T, D]`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias)
        ctx.silu = activation == "silu"
        out: Tensor = shifted_node(inputs, weight, bias, ctx.silu)
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias = ctx.saved_tensors
        d_inputs, d_weight, d_bias = shifted_gradient_node(gradients[0], inputs, weight, bias, ctx.silu)
        return d_inputs, d_weight, None if bias is None else d_bias, None


def _forward(inputs: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    out, width = _room(inputs, weight, bias, silu), weight.shape[1]
    taps = weight.T.to(compute_dtype(inputs, weight)).contiguous()
    for start, end in _stretches(out):
        y = _sums(inputs[:, start + 1 : end + width].to(taps.dtype), taps, bias)
        out[:, start:end] = F.silu(y, inplace=True) if silu else y
    return out


def _room(inputs: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return inputs.new_empty(inputs.shape[0], inputs.shape[1] - weight.shape[1], inputs.shape[2])


def _backward(
    d_out: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = weight.shape[1]
    taps = weight.T.to(compute_dtype(inputs, weight)).contiguous()
    d_inputs, d_taps, d_bias = inputs.new_zeros(inputs.shape), torch.zeros_like(taps), torch.zeros_like(taps[0])
    overlap: Tensor | None = None  # what a later stretch gives to the last W - 1 rows of this one
    for start, end in reversed(_stretches(d_out)):
        x = inputs[:, start + 1 : end + width].to(taps.dtype)
        dy = d_out[:, start:end].to(taps.dtype)
        if silu:
            dy = torch.ops.aten.silu_backward(dy, _sums(x, taps, bias))
        dx = torch.zeros_like(x)
        if overlap is not None:
            dx[:, end - start :] = overlap
        for tap, row in enumerate(taps):
            dx[:, tap : tap + end - start].addcmul_(dy, row)
            d_taps[tap] += (dy * x[:, tap : tap + end - start]).sum((0, 1))
        d_bias += dy.sum((0, 1))
        d_inputs[:, start + 1 : end + width] = dx
        overlap = dx[:, : width - 1]
    return d_inputs, d_taps.T.to(weight.dtype).contiguous(), d_bias.to(weight.dtype if bias is None else bias.dtype)


def _gradients(
    d_out: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(weight.shape[0]) if bias is None else bias.new_empty(bias.shape)
    return inputs.new_empty(inputs.shape), weight.new_empty(weight.shape), d_bias


shifted_node = register_node(
    "short_convolution(Tensor inputs, Tensor weight, Tensor? bias, bool silu) -> Tensor", _forward, _room
)
shifted_gradient_node = register_node(
    "short_convolution_gradient(Tensor d_out, Tensor inputs, Tensor weight, Tensor? bias, bool silu) -> "
    "(Tensor d_inputs, Tensor d_weight, Tensor d_bias)",
    _backward,
    _gradients,
)


def _sums(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """`[B, W - 1 + n, D]` to `[B, n, D]`: the convolution without its activation."""
    count = x.shape[1] - taps.shape[0] + 1
    y = x[:, taps.shape[0] - 1 :] * taps[-1]
    for tap in range(taps.shape[0] - 1):
        y.addcmul_(x[:, tap : tap + count], taps[tap])
    return y if bias is None else y.add_(bias.to(y.dtype))


def _stretches(x: Tensor) -> list[tuple[int, int]]:
    length = x.shape[1]
    size = max(64, STRETCH[x.is_cuda] * length // max(1, x.numel()))
    return [(start, min(start + size, length)) for start in range(0, length, size)]
