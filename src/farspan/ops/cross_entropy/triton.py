"""The launch of cross entropy in place."""

import torch
from torch import Tensor

from farspan.ops._launch import Constants, launch
from farspan.ops.cross_entropy.kernels import cross_entropy_kernel

# Columns at once, and warps.
BLOCK, WARPS = 4096, 8
FORMS = {
    (slope, even): Constants(BV=BLOCK, SLOPE=slope, EVEN=even) for slope in (False, True) for even in (False, True)
}


def cross_entropy_triton(logits: Tensor, labels: Tensor, classes: int, slope: bool) -> Tensor:
    """The kernel's form of `cross_entropy_in_place`."""
    nll = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    columns = logits.shape[1]
    if slope:  # a kernel says nothing to autograd, which may have saved the logits
        torch.autograd.graph.increment_version(logits)
    tensors, form = (logits, labels.contiguous(), nll), FORMS[slope, columns % 16 == 0]
    with torch.cuda.device_of(logits):
        launch(cross_entropy_kernel, (len(labels),), (*tensors, columns, classes), form, WARPS)
    return nll
