"""Stops a run at the first loss or gradient that is not a number, before it reaches the weights."""

import math
import shlex

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
    if not math.isfinite(loss):
        weights = broken_weight(model) or "the weights were not changed by this step"
        raise NonFiniteError(f"step {step}: the loss is {loss}; {weights}.")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            bad = int((~torch.isfinite(parameter.grad)).sum())
            raise NonFiniteError(
                f"step {step}: the loss is {loss:.6g}, but {bad} of {parameter.grad.numel()} gradients of "
                f"{name!r} {tuple(parameter.shape)} are NaN or infinite; the weights were not changed by this step."
            )
    raise NonFiniteError(
        f"step {step}: every gradient is finite, but their norm overflows to {grad_norm}; the weights were not changed "
        "by this step."
    )


def broken_weight(model: nn.Module) -> str:
    """Names the first weights that are not finite; "" where all are, so that the forward pass overflowed."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights {name!r} {tuple(parameter.shape)} hold NaN or infinite values"
    return ""


def way_out(run_dir: str, preset: str | None, broken: bool) -> str:
    """What to do after a `NonFiniteError`: resuming would repeat the step.

    Args:
        run_dir: The run directory.
        preset: `model.preset` of the recipe, which cannot stand beside `model.from_pretrained`.
        broken: Whether the weights are not finite themselves; otherwise `run_dir` holds them as a model directory.
    """
    change = (
        "Resuming would repeat the step, so change something: a lower --train.learning-rate, a longer "
        "--train.warmup-steps, a smaller --train.max-grad-norm or --train.precision fp32. With that, "
    )
    if broken:
        return f"{change}start anew with --resume never."
    without_preset = " --model.preset None" if preset else ""
    return (
        f"{change}go on from these weights with --model.from-pretrained {shlex.quote(run_dir)}{without_preset} "
        "--output-dir ANOTHER, or start anew with --resume never."
    )
