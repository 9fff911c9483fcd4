"""What the kernels cannot serve, told without importing them."""

from collections.abc import Sequence

import torch
from torch import Tensor

WIDEST_KEY = 128


def kernel_limits(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot serve these tensors, q first; None if they can."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "the kernels compute in at most float32"
    if tensors[0].shape[-1] > WIDEST_KEY:
        return f"the kernels hold at most {WIDEST_KEY} key channels per head, not {tensors[0].shape[-1]}"
    return None
