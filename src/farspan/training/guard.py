"""Stops a run at the first loss or gradient that is not a number, before it reaches the weights."""

import math

import torch
from torch import nn

from farspan.errors import FarspanError


class NonFiniteError(FarspanError, ArithmeticError):
    """The loss or a gradient became NaN or infinite; the weights are still those of the step before."""


def check_finite(step: int, loss: float, grad_norm: float, model: nn.Module) -> None:
    """Raises if this step must not be taken.

    The norm of all gradients is computed for clipping anyway and is finite only if every gradient is, so a healthy
    step costs two comparisons; parameters are searched only once something is wrong.

    Args:
        step: Number of the step, as it appears in the log.
        loss: Loss of this step.
        grad_norm: Norm of all gradients, before clipping.
        model: The model with its gradients still in place.

    Raises:
        NonFiniteError: naming the step and the loss, or the first parameter whose gradient is not finite.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    advice = (
        "The weights were not changed by this step. Resuming repeats the step, so change something: a lower "
        "train.learning_rate, a longer train.warmup_steps, a smaller train.max_grad_norm or train.precision fp32."
    )
    if not math.isfinite(loss):
        raise NonFiniteError(f"step {step}: the loss is {loss}. {_broken_weight(model)}{advice}")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            bad = int((~torch.isfinite(parameter.grad)).sum())
            raise NonFiniteError(
                f"step {step}: the loss is {loss:.6g}, but {bad} of {parameter.grad.numel()} gradients of "
                f"{name!r} {tuple(parameter.shape)} are NaN or infinite. {advice}"
            )
    raise NonFiniteError(f"step {step}: every gradient is finite, but their norm overflows to {grad_norm}. {advice}")


def _broken_weight(model: nn.Module) -> str:
    """Tells a bad input or overflow in the forward pass from weights that were already broken."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"The weights {name!r} {tuple(parameter.shape)} hold NaN or infinite values. "
    return ""
