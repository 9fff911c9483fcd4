"""The public function of cross entropy in place: checks, choice of the backend, call."""

import torch
from torch import Tensor

from farspan.errors import ShapeError
from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, compute_dtype


@torch.no_grad()
def cross_entropy_in_place(
    logits: Tensor, labels: Tensor, *, classes: int | None = None, slope: bool = True, backend: str = "auto"
) -> Tensor:
    """Negative log-likelihood of every label; with `slope`, its gradient overwrites the logits.

        nll_n = log Σ_j exp(z_nj) − z_n[label_n],    z_nj ← exp(z_nj) / Σ_i exp(z_ni) − [j = label_n]

    Both are 0 where the label is negative. Nothing else of the size of the logits is formed on a GPU.

    Args:
        logits: z, `[N, S]`, contiguous, any floating dtype.
        labels: `[N]` int64, from 0 to `classes` − 1; negative ones are not scored.
        classes: columns that are classes; those behind them are room (their slope is 0). None takes all S.
        slope: whether to overwrite the logits; otherwise they stay.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`.

    Returns:
        `[N]` float32 (float64 for float64 logits), in nats.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        Logits are read twice and written once; without `slope` read once.

    Source:
        Softmax regression; that the gradient is formed with the loss, in its logits' place: Hsu et al. 2024, "Liger
        Kernel" (arXiv 2410.10989).

    Example:
        >>> z = torch.zeros(1, 4)
        >>> round(cross_entropy_in_place(z, torch.tensor([2])).exp().item(), 4), z.tolist()
        (4.0, [[0.25, 0.25, -0.75, 0.25]])
    """
    contract = Contract("cross_entropy_in_place")
    contract.tensor("logits", logits, "N S")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or not logits.is_contiguous():
        raise ShapeError(
            f"cross_entropy_in_place: labels are {labels.dtype} of shape {list(labels.shape)}, logits have shape "
            f"{list(logits.shape)}; expected int64 [N] beside contiguous [N, S]."
        )
    classes = logits.shape[1] if classes is None else classes
    nll: Tensor = resolve("cross_entropy_in_place", backend, (logits,))(logits, labels, classes, slope)
    return nll


def cross_entropy_torch(logits: Tensor, labels: Tensor, classes: int, slope: bool) -> Tensor:
    """The form in PyTorch operations."""
    kept = labels >= 0
    targets = labels.clamp(min=0).unsqueeze(-1)
    wide = logits[:, :classes].to(compute_dtype(logits))
    normaliser = wide.logsumexp(-1)
    nll = (normaliser - wide.gather(-1, targets).squeeze(-1)).masked_fill(~kept, 0.0)
    if slope:
        wide.sub_(normaliser.unsqueeze(-1)).exp_()
        wide.scatter_add_(-1, targets, wide.new_full(targets.shape, -1.0)).masked_fill_(~kept.unsqueeze(-1), 0.0)
        if wide.dtype != logits.dtype:
            logits[:, :classes] = wide
        logits[:, classes:] = 0.0
    return nll


register(
    "cross_entropy_in_place",
    reference=cross_entropy_torch,
    torch=cross_entropy_torch,
    triton="farspan.ops.cross_entropy.triton:cross_entropy_triton",
    triton_limits=no_double,
)
