"""What the kernels cannot serve, told without importing them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kernel_limits(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot serve these tensors; None if they can."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "the kernels compute in at most float32"
    return None
