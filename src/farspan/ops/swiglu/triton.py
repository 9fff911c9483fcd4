"""SwiGLU's product through Triton kernels, and its gradients, for which it keeps nothing but its arguments."""

from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops.swiglu.api import swiglu_torch
from farspan.ops.swiglu.kernels import gradient_kernel, swiglu_kernel

CHANNELS = 512  # of one program


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """The kernels' form of `swiglu`."""
    out: Tensor = _Product.apply(gate, up)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=up.dtype, device=up.device)
        _launch(swiglu_kernel, (gate, up), (out,))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated: that of the PyTorch form can be
            wanted = [x for x in (gate, up) if x.requires_grad]
            found = iter(torch.autograd.grad(swiglu_torch(gate, up), wanted, gradients, create_graph=True))
            return tuple(next(found) if x.requires_grad else None for x in (gate, up))
        d_gate, d_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        _launch(gradient_kernel, (*gradients, gate, up), (d_gate, d_up))
        return d_gate, d_up


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    inputs = tuple(x if _regular(x) else x.contiguous() for x in inputs)
    channels = inputs[0].shape[-1]
    block = min(CHANNELS, triton.next_power_of_2(channels))
    grid = outputs[0].numel() // max(1, channels), triton.cdiv(channels, block)
    if 0 not in grid:
        rows = (x.stride(1) for x in inputs)
        with torch.cuda.device_of(outputs[0]):
            kernel[grid](*inputs, *outputs, *rows, channels, BF=block, num_warps=4)


def _regular(x: Tensor) -> bool:
    """Whether all rows of all batches are evenly apart and their channels side by side."""
    return x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
