"""Biases and rankings of keys straight from a layer's input: the same for equal tokens, whatever the shapes."""

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, compute_dtype, without_autocast

# exp of more would leave float32; a key of this bias takes all weight anyway.
LARGEST_EXPONENT = 80.0
# Tokens whose inputs are held in float64 at once.
ROWS_AT_ONCE = 1 << 15


def dynamic_mask_scores(
    x: Tensor, weight: Tensor, offset: Tensor | None, scale: Tensor, *, exponential: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Biases and rankings of keys, formed in float64 and rounded once; no gradients.

        z = x Wᵀ + o;  r = A · softplus(z);  b = exp(min(r, 80)), or r

    Where two tokens are equal, so must their rankings be, since age decides between equals. In 16 or 32 bits the last
    bit of a matrix product depends on its shape and on the place of the row; in float64, rounded to float32, it does
    not.

    Args:
        x: `[B, T, D]`, the layer's input.
        weight: `[M, D]` float64, W: the products of the value projection and of the bias heads' weights.
        offset: `[M]` float64, o; None is 0.
        scale: `[M]`, A.
        exponential: whether b is the exponential of r.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`.

    Returns:
        b `[B, T, M]` float32, float64 for a float64 x; r `[B, T, M]` float32.

    Raises:
        ShapeError: for shapes or devices that do not fit.
        BackendUnavailable: for a named backend that cannot serve.

    Cost:
        One read of x; one kernel on a GPU.

    Source:
        Shi et al., arXiv:2412.11834; ranking by the layer's input is this library's.

    Example:
        >>> import torch
        >>> x, weight = torch.tensor([[[0.0], [100.0]]]), torch.ones(1, 1, dtype=torch.float64)
        >>> bias, ranking = dynamic_mask_scores(x, weight, None, torch.tensor([0.01]))
        >>> [round(b, 4) for b in bias.flatten().tolist()], [round(r, 4) for r in ranking.flatten().tolist()]
        ([1.007, 2.7183], [0.0069, 1.0])
    """
    contract = Contract("dynamic_mask_scores")
    contract.tensor("x", x, "B T D")
    contract.tensor("weight", weight, "M D")
    contract.tensor("offset", offset, "M")
    contract.tensor("scale", scale, "M")
    implementation = resolve("dynamic_mask_scores", backend, (x, scale))
    with torch.no_grad(), without_autocast(x):
        scores: tuple[Tensor, Tensor] = implementation(x, weight, offset, scale, exponential)
    return scores


def dynamic_mask_scores_torch(
    x: Tensor, weight: Tensor, offset: Tensor | None, scale: Tensor, exponential: bool
) -> tuple[Tensor, Tensor]:
    """The formula as it stands; arguments as `dynamic_mask_scores`."""
    logits = [linear(part.double(), weight, offset) for part in x.split(ROWS_AT_ONCE, dim=1)]
    ranking = scale.double() * softplus(torch.cat(logits, dim=1))
    bias = ranking.clamp(max=LARGEST_EXPONENT).exp() if exponential else ranking
    return bias.to(compute_dtype(x)), ranking.float()


register(
    "dynamic_mask_scores",
    reference=dynamic_mask_scores_torch,
    torch=dynamic_mask_scores_torch,
    triton="farspan.ops.dynamic_mask.scores_triton:dynamic_mask_scores_triton",
    triton_limits=no_double,
)
