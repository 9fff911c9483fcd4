"""Several linear maps of one input as a single product, while text is generated."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from farspan.nn.plain import is_plain


class Joint:
    """The maps' weights laid end to end in one matrix; their parameters become views of it, so nothing is held twice.

    A decoding step of a small model is bound by the number of its kernels, and four products of a few rows take four
    times as long as one of the same size.

    Args:
        linears: maps of the same input width.
    """

    @torch.inference_mode(False)  # what is made in inference mode could not be trained afterwards
    def __init__(self, linears: list[nn.Linear]) -> None:
        self._linears = linears
        self._sizes = [linear.out_features for linear in linears]
        self._weight = torch.cat([linear.weight.detach() for linear in linears])
        self._bias: Tensor | None = None
        if any(linear.bias is not None for linear in linears):
            biases = [
                linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
                for linear in linears
            ]
            self._bias = torch.cat(biases)
            for linear, part in zip(linears, self._bias.split(self._sizes), strict=True):
                if linear.bias is not None:
                    linear.bias.data = part
        for linear, part in zip(linears, self._weight.split(self._sizes), strict=True):
            linear.weight.data = part

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[..., D]` → what each map gives, as slices of one tensor."""
        return F.linear(x, self._weight, self._bias).split(self._sizes, dim=-1)

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Gives every map parameters of its own again."""
        for linear in self._linears:
            for parameter in linear.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def projected(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """What each map that a module names in `joint_projections` gives for `[..., D]`, by one product where joined.

    With gradients the maps run by themselves: theirs are the parameters, and a text may still be open.
    """
    if module.joint is not None and not torch.is_grad_enabled():
        parts: tuple[Tensor, ...] = module.joint(x)
        return parts
    return tuple(getattr(module, name)(x) for name in module.joint_projections)


@contextlib.contextmanager
def joined(model: nn.Module) -> Iterator[None]:
    """Joins what the modules of a model name in `joint_projections`, and separates it again.

    Only plain linear maps of one dtype on one device are joined: what has been quantised, adapted or offloaded stays as
    it is.
    """
    joints = []
    try:
        for module in model.modules():
            linears: list[Any] = [getattr(module, name, None) for name in getattr(module, "joint_projections", ())]
            if len(linears) < 2 or not is_plain(*linears):
                continue
            if len({(linear.weight.dtype, linear.weight.device) for linear in linears}) == 1:
                joint = Joint(linears)
                module.joint = joint  # type: ignore[assignment]
                joints.append((module, joint))
        yield
    finally:
        for module, joint in joints:
            module.joint = None  # type: ignore[assignment]
            joint.undo()
