"""AdamW for large tables of which a step touches few rows."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.errors import ConfigError
from farspan.ops._backend import no_double, register, resolve

# Numbers of a table that the PyTorch form handles at once; the kernel takes rows of at most WIDEST numbers.
PART, WIDEST = 2**25, 8192


class RowSparseAdamW(torch.optim.AdamW):
    """AdamW that leaves the rows without a gradient alone: each row of a table is an AdamW of its own.

    In parameter groups with `row_sparse=True`, a step touches the rows whose gradient g is not all zero. With n the
    number of steps that have touched the row, this one included, η the learning rate and λ the weight decay:

        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²
        p ← (1 − η·λ)·p − η · m/(1 − β₁ⁿ) / (√(v/(1 − β₂ⁿ)) + ε)

    Every other row keeps its weights, moments and n to the bit. A row hence moves exactly as under AdamW over those
    steps alone that touched it, and a table of which every step touches every row as under AdamW. What differs from
    AdamW over all steps: there, a row without a gradient decays, goes on along its fading moments, and is corrected for
    a bias that the run has left behind. When it is touched again it is too late to make up for that: the step has read
    the row by then.

    Args:
        params: parameter groups, as for `torch.optim.AdamW`; those with `row_sparse=True` hold matrices.
        lr: learning rate η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.

    Raises:
        ConfigError: a row-sparse parameter that is no matrix, or is cut over ranks other than by rows.

    Cost:
        The gradient is dense and read once, 4 bytes a number; a touched row costs 24 bytes a number more, which is what
        AdamW costs for every row. Moments are those of AdamW, and one number more a row. On NVIDIA GPUs one kernel;
        elsewhere the touched rows are copied, in parts, and only few of them pay.

    Note:
        Tables cut by rows over ranks (`fully_shard`) are updated where they are, rank by rank. `torch.optim.SparseAdam`
        and TensorFlow's LazyAdam keep m and v as here, but count all steps in n: a row's first step is then shorter, or
        longer, the later it comes.

    Source:
        Loshchilov and Hutter 2019, arXiv 1711.05101, taken row by row.

    Example:
        >>> import torch
        >>> table = torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = RowSparseAdamW([{"params": [table], "row_sparse": True}], lr=0.5, weight_decay=0.0)
        >>> table.grad = torch.tensor([[0.0, 0.0], [2.0, -2.0], [0.0, 0.0]])
        >>> optimizer.step()
        >>> table.data
        tensor([[ 0.0000,  0.0000],
                [-0.5000,  0.5000],
                [ 0.0000,  0.0000]])
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler divides all gradients itself, those of tables too
        for table in (p for group in self.param_groups if group.get("row_sparse") for p in group["params"]):
            by_rows = not isinstance(table, DTensor) or all(
                at.is_shard(0) or at.is_replicate() for at in table.placements
            )
            if table.ndim != 2 or not by_rows:
                where = f" placed {table.placements}" if isinstance(table, DTensor) else ""
                raise ConfigError(
                    f"row_sparse: a parameter of shape {list(table.shape)}{where} has no rows of its own; accepted are "
                    "matrices, whole or cut over ranks by rows. Leave it to a group without row_sparse."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; see the class.

        Args:
            closure: computes the loss and its gradients; None where that has been done.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [
            (table, table.grad, group)
            for group in self.param_groups
            if group.get("row_sparse")
            for table in group["params"]
            if table.grad is not None
        ]
        try:
            for table, _, _ in tables:
                table.grad = None  # AdamW passes over it
            inspect.unwrap(torch.optim.AdamW.step)(self)  # PyTorch wraps it in the hooks of this step
        finally:
            for table, gradient, _ in tables:
                table.grad = gradient
        for table, gradient, group in tables:
            state = self.state[table]
            if not state:
                state["step"] = table[:, :0].sum(1, dtype=torch.float32)  # zeros, cut over ranks as the rows are
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
            held = (table, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"])
            local = [x.to_local() if isinstance(x, DTensor) else x for x in held]
            update = resolve("row_sparse_adamw", "auto", local)
            update(*local, group["lr"], group["betas"], group["eps"], group["lr"] * group["weight_decay"])
        return loss


def update_rows(
    table: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    shrink: float,
) -> None:
    """The touched rows of a table, in place.

    Args:
        table, gradient, exp_avg, exp_avg_sq: `[E, D]`: p, g, m and v.
        step: `[E]` float32, n before this step.
        rate: η.
        betas: β₁ and β₂.
        epsilon: ε.
        shrink: η·λ.
    """
    touched = gradient.any(dim=1).nonzero().squeeze(1)
    for rows in touched.split(max(1, PART // max(1, table.shape[1]))):
        g, n = gradient[rows], step[rows] + 1
        m = exp_avg[rows].lerp_(g, 1 - betas[0])
        v = exp_avg_sq[rows].mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        first, second = (1 - beta ** n.double().unsqueeze(1) for beta in betas)
        moved = (m / first.to(m.dtype)).div_((v / second.to(v.dtype)).sqrt_().add_(epsilon))
        table.index_copy_(0, rows, (table[rows] * (1 - shrink)).sub_(moved, alpha=rate))
        for held, new in ((exp_avg, m), (exp_avg_sq, v), (step, n)):
            held.index_copy_(0, rows, new)


def _limits(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernel cannot serve these tensors; None if it can."""
    if tensors[0].shape[1] > WIDEST:
        return f"the kernel holds rows of at most {WIDEST} numbers, not {tensors[0].shape[1]}"
    if not all(x.is_contiguous() for x in tensors):
        return "the kernel takes tables whose rows lie one behind the other"
    return no_double(tensors)


register(
    "row_sparse_adamw",
    reference=update_rows,
    torch=update_rows,
    triton="farspan.training.row_sparse_kernel:update_rows_triton",
    triton_limits=_limits,
)
