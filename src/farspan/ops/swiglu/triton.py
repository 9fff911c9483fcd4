"""SwiGLU's product through Triton kernels, and its gradients, for which it keeps nothing but its arguments."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._launch import Constants, compile_ahead, evenly, launch
from farspan.ops._library import register_node
from farspan.ops.swiglu.api import swiglu_torch
from farspan.ops.swiglu.kernels import gradient_kernel, swiglu_kernel

# Channels of a program, its warps and stages.
CHANNELS, SCHEDULE = 512, (4, 3)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """The kernels' form of `swiglu`."""
    out: Tensor = _Product.apply(gate, up)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = swiglu_node(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated: that of the PyTorch form can be
            wanted = [x for x in (gate, up) if x.requires_grad]
            found = iter(torch.autograd.grad(swiglu_torch(gate, up), wanted, gradients, create_graph=True))
            return tuple(next(found) if x.requires_grad else None for x in (gate, up))
        d_gate, d_up = swiglu_gradient_node(*gradients, gate, up)
        return d_gate, d_up


def _product(gate: Tensor, up: Tensor) -> Tensor:
    out, (gate, up) = _room(up), map(evenly, (gate, up))
    key = up.device, _constants((gate, up)), gate.dtype, up.dtype
    compile_ahead(("swiglu", *key), lambda: _rehearse(gate, up))
    _launch(swiglu_kernel, (gate, up), (out,))
    return out


def _gradients(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    made = _room(gate), _room(up)
    _launch(gradient_kernel, tuple(map(evenly, (d_out, gate, up))), made)
    return made


def _rehearse(gate: Tensor, up: Tensor) -> None:
    """Both launches, for one token."""
    gate, up = (x.new_empty_strided((1, 1, x.shape[2]), x.stride()) for x in (gate, up))
    _launch(swiglu_kernel, (gate, up), (up,))
    _launch(gradient_kernel, (_room(up), gate, up), (gate, up))


def _room(x: Tensor) -> Tensor:
    """Room for a result like x, without gaps."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    channels, constants = inputs[0].shape[-1], _constants(inputs)
    grid = outputs[0].numel() // max(1, channels), triton.cdiv(channels, constants["BF"])
    launch(kernel, grid, (*inputs, *outputs, *(x.stride(1) for x in inputs), channels), constants, *SCHEDULE)


def _constants(inputs: tuple[Tensor, ...]) -> Constants:
    channels = inputs[0].shape[-1]
    even = not any(size % 16 for size in (channels, *(x.stride(1) for x in inputs)))
    return _form(min(CHANNELS, triton.next_power_of_2(channels)), even)


@functools.cache
def _form(block: int, even: bool) -> Constants:
    return Constants(BF=block, EVEN=even)


swiglu_node = register_node("swiglu(Tensor gate, Tensor up) -> Tensor", _product, lambda gate, up: _room(up))
swiglu_gradient_node = register_node(
    "swiglu_gradient(Tensor d_out, Tensor gate, Tensor up) -> (Tensor d_gate, Tensor d_up)",
    _gradients,
    lambda d_out, gate, up: (_room(gate), _room(up)),
)
