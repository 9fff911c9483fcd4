"""What the kernels of dilated attention cannot serve, told without importing them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from farspan.ops.dilated.patterns import DilatedSettings, Span

WIDEST = 128


def kernel_limits(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot serve these queries, keys and values; None if they can."""
    if any(tensor.dtype not in (torch.float16, torch.bfloat16) for tensor in tensors):
        return "cuDNN's attention takes 16-bit numbers"
    width, values = tensors[0].shape[-1], tensors[2].shape[-1]
    if width != values or width > WIDEST or width % 8:
        return f"cuDNN's attention takes K = V, a multiple of 8 up to {WIDEST}, not K={width}, V={values}"
    return None


def option_limits(settings: DilatedSettings, spans: Sequence[Span]) -> str | None:
    """Why the kernels cannot serve these options; None if they can."""
    if settings.dropout:
        return "it has no dropout"
    if settings.distance_bias is not None:
        return "it has no distance_bias"
    if len(spans) != 1:
        return "it takes no packed documents"
    return "it fills no segments with zeros" if settings.filling(spans) else None
