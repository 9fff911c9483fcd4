"""Normalisations over the last dimension."""

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError, nearest


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, y = x / sqrt(mean(x²) + eps) · w, computed in float32.

    Args:
        size: width of the last dimension.
        eps: added to the mean square.
        affine: whether there is a weight `w`, `[size]`, starting at 1. Without one this is MetaLA's "simplermsnorm".
        eps_outside: GPT-NeoX's form, y = x / (sqrt(mean(x²)) + eps) · w.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, size: int, eps: float = 1e-6, affine: bool = True, eps_outside: bool = False) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.eps_outside = eps_outside
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.eps_outside and (self.weight is None or self.weight.dtype == x.dtype):
            return nn.functional.rms_norm(x, (self.size,), self.weight, self.eps)  # one kernel on a GPU
        wide = x.double() if x.dtype == torch.float64 else x.float()
        mean_square = wide.square().mean(-1, keepdim=True)
        y = wide / (mean_square.sqrt() + self.eps) if self.eps_outside else wide * torch.rsqrt(mean_square + self.eps)
        if self.weight is not None:
            y = y * self.weight
        return y.to(x.dtype)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, affine={self.weight is not None}"


NORMS = ("rms_norm", "layer_norm", "simple_rms_norm", "neox_rms_norm")


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """The normalisation named `kind`.

    Args:
        kind: `rms_norm`, `layer_norm`, `simple_rms_norm` (no parameters) or `neox_rms_norm` (eps outside the root).
        size: width of the last dimension.
        eps: epsilon.

    Raises:
        ConfigError: for an unknown kind.
    """
    if kind == "layer_norm":
        return nn.LayerNorm(size, eps=eps)
    if kind == "rms_norm":
        return RMSNorm(size, eps)
    if kind == "simple_rms_norm":
        return RMSNorm(size, eps, affine=False)
    if kind == "neox_rms_norm":
        return RMSNorm(size, eps, eps_outside=True)
    raise ConfigError(f"Unknown norm_type {kind!r}: {nearest(str(kind), NORMS)}")
