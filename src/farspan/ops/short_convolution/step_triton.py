"""The launch of the short convolution's decoding step."""

import torch
import triton
from torch import Tensor

from farspan.ops.short_convolution.step_kernels import step_kernel

CHANNELS = 256  # of one program


def short_convolution_step_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None
) -> Tensor:
    """The kernel's form of `short_convolution_step`; arguments as there."""
    rows, channels, width = state.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    block = min(CHANNELS, triton.next_power_of_2(channels))
    step_kernel[(rows, triton.cdiv(channels, block))](
        x,
        weight.contiguous(),
        out if bias is None else bias.contiguous(),
        state,
        out,
        channels,
        W=width,
        BW=triton.next_power_of_2(width),
        BD=block,
        BIASED=bias is not None,
        SILU=activation == "silu",
        num_warps=4,
    )
    return out
