"""The short convolution's kernels: their launches, their gradient, their nodes."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import plain_backward
from farspan.ops._launch import Constants, evenly, launch
from farspan.ops._library import register_node
from farspan.ops.short_convolution.kernels import convolution_kernel, gradient_kernel

# Tokens read at once and channels of a program, 4 warps each, and the tokens that it walks.
TILE, GRADIENT_TILE, WARPS, WALK = (16, 256), (8, 512), 4, 128


def short_convolution_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernels' form of the short convolution; arguments and results as the reference's."""
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    out: Tensor = _Convolution.apply(x, weight, bias, initial_state, cu_seqlens, activation == "silu")
    return out, _last(x, initial_state, cu_seqlens, weight.shape[1])


def _last(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, width: int) -> Tensor:
    """The last inputs of every document, `[num_seqs, D, W]`, of its own state where it is shorter than W."""
    if state is None:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = x.new_zeros(sequences, x.shape[2], width)
    if cu_seqlens is None:
        recent = x[:, max(0, x.shape[1] - width) :].mT
        return torch.cat([state[..., recent.shape[-1] :], recent], dim=-1)
    begins, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    places = ends - width + torch.arange(width, device=x.device)
    columns = (width + places - begins).clamp(max=width - 1)  # of the state, where a place lies before its document
    before = state.gather(2, columns.clamp(min=0)[:, None].expand_as(state))
    if x.shape[1] == 0:
        return before
    recent = x[0][places.clamp(min=0)].mT
    return torch.where((places >= begins)[:, None], recent, before)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, state, cu_seqlens)
        ctx.silu = silu
        out: Tensor = convolution_node(x, weight, bias, state, cu_seqlens, silu)
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        d_x, d_weight, d_bias, d_state = convolution_gradient_node(gradients[0], *saved, ctx.silu)
        _, _, bias, state, _ = saved
        return d_x, d_weight, None if bias is None else d_bias, None if state is None else d_state, None, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    x, (batch, length, channels) = evenly(x), x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    start, sequence = _documents(cu_seqlens, length, out)
    state = out if state is None else state.contiguous()
    switches = bias is not None, silu, state is not out, cu_seqlens is not None
    constants = _constants(weight.shape[1], *switches, _even(x))
    blocks = triton.cdiv(length, WALK)
    numbers = length, channels, x.stride(1), blocks, WALK
    launch(
        convolution_kernel,
        (batch * blocks, triton.cdiv(channels, constants["BD"])),
        (x, weight.contiguous(), weight if bias is None else bias.contiguous(), state, start, sequence, out, *numbers),
        constants,
        WARPS,
    )
    return out


def _backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, d_out, weight, (batch, length, channels) = evenly(x), d_out.contiguous(), weight.contiguous(), x.shape
    d_x, d_weight, d_bias, d_state = _gradients(d_out, x, weight, bias, state)
    start, sequence = _documents(cu_seqlens, length, d_out)
    width, before = weight.shape[1], d_x if state is None else state.contiguous()
    switches = bias is not None, silu, state is not None, cu_seqlens is not None
    constants = _constants(width, *switches, _even(x), gradient=True)
    stretch = WALK - width + 1  # the W - 1 tokens behind it are read as well
    blocks = triton.cdiv(length, stretch)
    sums = torch.empty(batch * blocks, width + 1, channels, dtype=torch.float32, device=x.device)
    given = d_out, x, weight, weight if bias is None else bias.contiguous(), before, start, sequence
    numbers = length, channels, x.stride(1), blocks, stretch
    launch(
        gradient_kernel,
        (batch * blocks, triton.cdiv(channels, constants["BD"])),
        (*given, d_x, sums, d_state, *numbers),
        constants,
        WARPS,
    )
    total = sums.sum(0)
    d_weight.copy_(total[:width].T)
    d_bias.copy_(total[width])
    return d_x, d_weight, d_bias, d_state


def _gradients(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients, zeros for states of empty documents; without a bias or a state theirs is not read."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    d_bias = weight.new_empty(weight.shape[0]) if bias is None else torch.empty_like(bias)
    d_state = x.new_empty(0) if state is None else torch.zeros(state.shape, dtype=state.dtype, device=x.device)
    return d_x, d_weight, d_bias, d_state


def _even(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 numbers."""
    return x.shape[2] % 16 == 0 and x.stride(1) % 16 == 0


def _documents(cu_seqlens: Tensor | None, length: int, unused: Tensor) -> tuple[Tensor, Tensor]:
    """First token and number of each token's document, int32 `[T]`."""
    if cu_seqlens is None:
        return unused, unused
    sequence = varlen.sequence_ids(cu_seqlens, length)
    return cu_seqlens[sequence].int(), sequence.int()


@functools.cache
def _constants(
    width: int, biased: bool, silu: bool, state: bool, packed: bool, even: bool, *, gradient: bool = False
) -> Constants:
    rows, channels = GRADIENT_TILE if gradient else TILE
    switches = {"BIASED": biased, "SILU": silu, "STATE": state, "PACKED": packed, "EVEN": even}
    return Constants(W=width, BT=rows, BD=channels, **switches)


convolution_node = register_node(
    "short_convolution_kernels(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, bool silu) "
    "-> Tensor",
    _forward,
    lambda x, *others: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
convolution_gradient_node = register_node(
    "short_convolution_kernels_gradient(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, Tensor? state, "
    "Tensor? cu_seqlens, bool silu) -> (Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_state)",
    _backward,
    _gradients,
)
