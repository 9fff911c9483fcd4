"""The fast forms in PyTorch: few candidates for the top k, and experts that are never laid out per token.

Three maps carry everything, and each is the gradient of the others, so that derivatives of any order are exact:

    dots(x, table)[n, r]  = <x_n, table[id_nr]>
    mix(c, table)[n]      = sum_r c_nr table[id_nr]
    gather(c, x)[e]       = sum over the slots (n, r) of expert e of c_nr x_n

`mix` and `gather` are bags of rows that are summed where they are read. A bag is summed by one worker in a fixed order,
by token in `mix` and by expert in `gather`: nothing is added atomically and results do not depend on timing.
"""

from typing import Any, NamedTuple

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
    rank_x, rank_y = candidate_ranks(k, keys, device)
    with torch.no_grad():
        x, order_x = (t[..., :k] for t in scores_x.sort(dim=-1, descending=True, stable=True))
        y, order_y = (t[..., :k] for t in scores_y.sort(dim=-1, descending=True, stable=True))
        sums = x.index_select(-1, rank_x) + y.index_select(-1, rank_y)
        best = sums.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        chosen_x, chosen_y = order_x.gather(-1, rank_x[best]), order_y.gather(-1, rank_y[best])
    return scores_x.gather(-1, chosen_x) + scores_y.gather(-1, chosen_y), chosen_x * keys + chosen_y


def candidate_ranks(k: int, keys: int, device: torch.device) -> Tensor:
    """The pairs of ranks on both axes, counted from 0, whose sums can be among the best k: `[2, candidates]` int64.

    They are made on the device: a copy from the host could not stand in a CUDA graph.
    """
    rows = min(k, keys)
    partners = (k // torch.arange(1, rows + 1, device=device)).clamp(max=keys)
    candidates = sum(min(k // i, keys) for i in range(1, rows + 1))
    rank_x = torch.arange(rows, device=device).repeat_interleave(partners, output_size=candidates)
    begins = partners.cumsum(0) - partners
    return torch.stack((rank_x, torch.arange(candidates, device=device) - begins[rank_x]))


def retrieved_experts_bags(
    x: Tensor, expert_ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, *, activation: str
) -> Tensor:
    """The fast form of `retrieved_experts`; arguments and result as the reference's."""
    differentiated = torch.is_grad_enabled() and (down.requires_grad or up.requires_grad)
    slots = Slots.of(expert_ids, len(down)) if differentiated else Slots(expert_ids, expert_ids, expert_ids)
    hidden = _Dots.apply(x.to(down.dtype), down, *slots)
    coefficients = weights.to(hidden.dtype) * ACTIVATIONS[activation](hidden)
    return _Mix.apply(coefficients, up, *slots).to(x.dtype)


class Slots(NamedTuple):
    """Which expert stands in each slot of each token, and the slots of each expert.

    Attributes:
        ids: `[N, R]`.
        order: `[N·R]`, the slots in the order of their experts; those of one expert in the order of tokens.
        begins: `[E + 1]`, where the slots of each expert begin in it.
    """

    ids: Tensor
    order: Tensor
    begins: Tensor

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> "Slots":
        # The sort takes its time by the bytes of its keys.
        narrow = torch.int16 if experts < 2**15 else torch.int32 if experts < 2**31 else torch.int64
        by_expert, order = ids.flatten().to(narrow).sort(stable=True)
        numbers = torch.arange(experts + 1, device=ids.device, dtype=narrow)
        return cls(ids, order, torch.searchsorted(by_expert, numbers))


def _dots(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    out = x.new_empty(ids.shape, dtype=compute_dtype(x, table))
    step = max(1, STRETCH[x.is_cuda] // max(1, ids.shape[1] * x.shape[1]))
    for start in range(0, len(x), step):
        some = ids[start : start + step]
        rows = table.index_select(0, some.flatten()).to(out.dtype).unflatten(0, some.shape)
        out[start : start + step] = rows.mul_(x[start : start + step].unsqueeze(1)).sum(-1)
    return out


def _mix(coefficients: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(ids, table, mode="sum", per_sample_weights=coefficients.to(table.dtype))


def _gather(coefficients: Tensor, ids: Tensor, order: Tensor, begins: Tensor, x: Tensor) -> Tensor:
    shares = coefficients.flatten()[order].to(x.dtype)
    return F.embedding_bag(order // ids.shape[1], x, begins[:-1], mode="sum", per_sample_weights=shares)


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, ids: Tensor, order: Tensor, begins: Tensor) -> Tensor:
        ctx.save_for_backward(x, table, ids, order, begins)
        return _dots(x, ids, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, table, *slots = ctx.saved_tensors
        (d_out,) = gradients
        dx = _Mix.apply(d_out, table, *slots) if ctx.needs_input_grad[0] else None
        d_table = _Gather.apply(d_out, x, *slots) if ctx.needs_input_grad[1] else None
        return dx, d_table, None, None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, table: Tensor, ids: Tensor, order: Tensor, begins: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, table, ids, order, begins)
        return _mix(coefficients, ids, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, table, *slots = ctx.saved_tensors
        (d_out,) = gradients
        d_coefficients = _Dots.apply(d_out, table, *slots) if ctx.needs_input_grad[0] else None
        d_table = _Gather.apply(coefficients, d_out, *slots) if ctx.needs_input_grad[1] else None
        return d_coefficients, d_table, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, x: Tensor, ids: Tensor, order: Tensor, begins: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, x, ids, order, begins)
        return _gather(coefficients, ids, order, begins, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, x, *slots = ctx.saved_tensors
        (d_table,) = gradients
        d_coefficients = _Dots.apply(x, d_table, *slots) if ctx.needs_input_grad[0] else None
        dx = _Mix.apply(coefficients, d_table, *slots) if ctx.needs_input_grad[1] else None
        return d_coefficients, dx, None, None, None
