"""What is measured: one call on random inputs, and the case that makes it at any shape."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Leaves = dict[str, Tensor]
Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Workload:
    """One call to measure.

    Attributes:
        leaves: the differentiable inputs.
        call: the operator on them; returns its output.
        flops: operations of the forward pass that the formula needs, 2 per multiply-add; 0 where it has none to count.
        backward: operations of the backward pass as a multiple of the forward's.
        parameters: what else receives a gradient, for a whole layer.
    """

    leaves: Leaves
    call: Callable[[Leaves], Tensor]
    flops: float
    backward: float = 2.0
    parameters: tuple[Tensor, ...] = ()

    def forget(self) -> None:
        """Lets go of all gradients."""
        for tensor in (*self.leaves.values(), *self.parameters):
            tensor.grad = None

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs."""
        return sum(tensor.nbytes for tensor in (*self.leaves.values(), *self.parameters))


@dataclass(frozen=True)
class OpCase:
    """An operator, a layer, or a peer's, that can be measured.

    Attributes:
        make: rows, tokens, dtype and device → the workload.
        peer_of: the operator of ours that it stands beside; None for our own.
        needs: the package that a peer comes from.
        cuda: whether it runs on GPUs only.
        shapes: rows and tokens that are measured on a GPU unless others are asked for.
        most_tokens: longest row; more would not fit, or never end.
    """

    make: Callable[[int, int, torch.dtype, torch.device], Workload]
    peer_of: str | None = None
    needs: str | None = None
    cuda: bool = False
    shapes: Shapes = ((16, 2048), (1, 32768))
    most_tokens: int | None = None

    def missing(self, device: torch.device, tokens: int = 1) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.most_tokens is not None and tokens > self.most_tokens:
            return f"a row of {tokens} tokens is beyond it"
        return "it needs an NVIDIA GPU" if self.cuda and device.type != "cuda" else None


def draw(names: str, *size: int, dtype: torch.dtype, device: torch.device, std: float = 1.0) -> Leaves:
    """Normal inputs by name, the same at every call."""
    generator = torch.Generator(device).manual_seed(size[1])
    return {
        name: (std * torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()
        for name in names.split()
    }


def pairs(rows: int, tokens: int, heads: int, width: int, keys: float | None = None) -> float:
    """Operations of causal softmax attention with so many keys per query on average; None is half of all."""
    return 4.0 * rows * tokens * heads * width * ((tokens + 1) / 2 if keys is None else keys)


def of_layer(
    layer: nn.Module, x: Leaves, call: Callable[[nn.Module, Tensor], Tensor], flops: float, backward: float = 2.0
) -> Workload:
    """A whole layer on its input `x`."""
    parameters = tuple(layer.parameters())
    return Workload(x, lambda leaves: call(layer, leaves["x"]), flops, backward, parameters)
