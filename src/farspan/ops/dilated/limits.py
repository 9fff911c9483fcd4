"""What the kernels of dilated attention cannot serve, told without importing them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from farspan.ops.dilated.patterns import DilatedSettings, sequences

# Channels of a head in 16 bit and in float32.
WIDEST, WIDEST_FLOAT32 = 128, 64
# Growth by e to this power, and as much decay, leaves float16 room for queries and keys.
LARGEST_FLOAT16 = 6.0


def kernel_limits(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot serve these queries, keys and values; None if they can."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "its kernels take no float64"
    width = max(tensors[0].shape[-1], tensors[2].shape[-1])
    widest = WIDEST_FLOAT32 if any(tensor.dtype == torch.float32 for tensor in tensors) else WIDEST
    return f"its kernels take head sizes up to {widest} in this dtype, not {width}" if width > widest else None


def option_limits(q: Tensor, settings: DilatedSettings, cu_seqlens: Tensor | None) -> str | None:
    """Why the kernels cannot serve these options for these queries; None if they can."""
    spans = sequences(cu_seqlens, q.shape[1])
    if settings.dropout:
        return "its kernels have no dropout"
    if settings.growth is not None:
        window = settings.window(spans)
        if window is None:
            return "its kernels turn positions by segments that divide the longest alone"
        if q.dtype == torch.float16 and not _fits_float16(settings.growth, window):
            return "its kernels turn queries and keys in their dtype, and positions outgrow float16"
    unknown = settings.zero_keys and cu_seqlens is not None and torch.compiler.is_compiling()
    return "its kernels fill no segments with zeros" if unknown or settings.filling(spans) else None


def _fits_float16(growth: Tensor, window: int) -> bool:
    """Reads a number from the device; a compiled graph, which may not, gets no for an answer."""
    return not torch.compiler.is_compiling() and float(growth.abs().max()) * window / 2 <= LARGEST_FLOAT16


def cudnn_serves(q: Tensor, v: Tensor, settings: DilatedSettings, cu_seqlens: Tensor | None) -> bool:
    """Whether cuDNN takes these queries and values of one dtype: 16 bit, K = V, no bias, no packed documents."""
    fitting = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    return fitting and settings.distance_bias is None and (cu_seqlens is None or len(cu_seqlens) == 2)
