"""The fast forms in PyTorch: few candidates for the top k, and experts that are never laid out per token.

Three maps carry everything, and each is the gradient of the others, so that derivatives of any order are exact:

    dots(x, table)[n, r]  = <x_n, table[id_nr]>
    mix(c, table)[n]      = sum_r c_nr table[id_nr]
    gather(c, x)[e]       = sum over the slots (n, r) of expert e of c_nr x_n

`mix` and `gather` are bags of rows that are summed where they are read. A bag is summed by one worker in a fixed order,
by token in `mix` and by expert in `gather`: nothing is added atomically and results do not depend on timing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops._contract import compute_dtype
from farspan.ops.activations import ACTIVATIONS

# Numbers gathered at once for the dot products: on a CPU what the caches hold.
STRETCH = {False: 1 << 18, True: 1 << 26}


def product_key_topk_sorted(scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The fast form of `product_key_topk`: sorts both axes and compares only the pairs that can be among the best k.

    A pair of ranks (i, j), counted from 1, has i·j - 1 pairs before it; those with i·j > k need not be looked at. About
    k·ln k candidates remain of P².
    """
    keys, device = scores_x.shape[-1], scores_x.device
    ranks = [(i, j) for i in range(min(k, keys)) for j in range(min(k // (i + 1), keys))]
    rank_x, rank_y = torch.tensor(ranks, device=device).unbind(-1)
    with torch.no_grad():
        x, order_x = (t[..., :k] for t in scores_x.sort(dim=-1, descending=True, stable=True))
        y, order_y = (t[..., :k] for t in scores_y.sort(dim=-1, descending=True, stable=True))
        sums = x.index_select(-1, rank_x) + y.index_select(-1, rank_y)
        best = sums.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        chosen_x, chosen_y = order_x.gather(-1, rank_x[best]), order_y.gather(-1, rank_y[best])
    return scores_x.gather(-1, chosen_x) + scores_y.gather(-1, chosen_y), chosen_x * keys + chosen_y


def retrieved_experts_bags(
    x: Tensor, expert_ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, *, activation: str
) -> Tensor:
    """The fast form of `retrieved_experts`; arguments and result as the reference's."""
    hidden = _Dots.apply(x.to(down.dtype), expert_ids, down)
    coefficients = weights.to(hidden.dtype) * ACTIVATIONS[activation](hidden)
    return _Mix.apply(coefficients, expert_ids, up).to(x.dtype)


class _Dots(torch.autograd.Function):
    """`[N, D]` and `[E, D]` to `[N, R]`, accumulated in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(x, ids, table)
        out = x.new_empty(ids.shape, dtype=compute_dtype(x, table))
        step = max(1, STRETCH[x.is_cuda] // max(1, ids.shape[1] * x.shape[1]))
        for start in range(0, len(x), step):
            some = ids[start : start + step]
            rows = table.index_select(0, some.flatten()).to(out.dtype).unflatten(0, some.shape)
            out[start : start + step] = rows.mul_(x[start : start + step].unsqueeze(1)).sum(-1)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, table = ctx.saved_tensors
        (d_out,) = gradients
        dx = _Mix.apply(d_out, ids, table) if ctx.needs_input_grad[0] else None
        return dx, None, _Gather.apply(d_out, ids, x, len(table)) if ctx.needs_input_grad[2] else None


class _Mix(torch.autograd.Function):
    """`[N, R]` and `[E, D]` to `[N, D]` in the table's dtype."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, ids, table)
        return F.embedding_bag(ids, table, mode="sum", per_sample_weights=coefficients.to(table.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, ids, table = ctx.saved_tensors
        (d_out,) = gradients
        d_coefficients = _Dots.apply(d_out, ids, table) if ctx.needs_input_grad[0] else None
        d_table = _Gather.apply(coefficients, ids, d_out, len(table)) if ctx.needs_input_grad[2] else None
        return d_coefficients, None, d_table


class _Gather(torch.autograd.Function):
    """`[N, R]` and `[N, D]` to `[E, D]` in x's dtype: the slots sorted by expert, one bag per expert."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, ids: Tensor, x: Tensor, experts: int) -> Tensor:
        ctx.save_for_backward(coefficients, ids, x)
        by_expert, order = ids.flatten().sort(stable=True)
        begins = torch.searchsorted(by_expert, torch.arange(experts, device=ids.device))
        shares = coefficients.flatten()[order].to(x.dtype)
        return F.embedding_bag(order // ids.shape[1], x, begins, mode="sum", per_sample_weights=shares)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, ids, x = ctx.saved_tensors
        (d_table,) = gradients
        d_coefficients = _Dots.apply(x, ids, d_table) if ctx.needs_input_grad[0] else None
        return d_coefficients, None, _Mix.apply(coefficients, ids, d_table) if ctx.needs_input_grad[2] else None, None
