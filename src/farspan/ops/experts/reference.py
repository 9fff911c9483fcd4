"""Product keys and retrieved experts as their formulas: the definitions that the faster forms are tested against."""

import torch
from torch import Tensor

from farspan.ops._contract import compute_dtype
from farspan.ops.activations import ACTIVATIONS


def product_key_topk_reference(scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sorts all P² sums; arguments and results as in `product_key_topk`.

    The sums stand in the order of their ranks on both axes and the sort is stable, so that of equal sums the one with
    the better x comes first, then the one with the better y, and of equal scores on an axis the smaller index.

    Returns:
        Scores and expert ids, `[N, H, k]` both.
    """
    keys = scores_x.shape[-1]
    x, order_x = scores_x.sort(dim=-1, descending=True, stable=True)
    y, order_y = scores_y.sort(dim=-1, descending=True, stable=True)
    sums, place = (x.unsqueeze(-1) + y.unsqueeze(-2)).flatten(-2).sort(dim=-1, descending=True, stable=True)
    place = place[..., :k]
    return sums[..., :k], order_x.gather(-1, place // keys) * keys + order_y.gather(-1, place % keys)


def retrieved_experts_reference(
    x: Tensor, expert_ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, *, activation: str
) -> Tensor:
    """Computes `sum_r w_r act(<x, u_r>) v_r` with one copy of u and v per slot, O(N·R·D) memory.

    Args:
        x: `[N, D]`.
        expert_ids: `[N, R]` int64.
        weights: `[N, R]`.
        down: `[E, D]`, the vectors u.
        up: `[E, D]`, the vectors v.
        activation: name of the elementwise function.

    Returns:
        `[N, D]` in x's dtype.
    """
    dtype = compute_dtype(x, weights, down, up)
    hidden = torch.einsum("nd,nrd->nr", x.to(dtype), down[expert_ids].to(dtype))
    coefficients = weights.to(dtype) * ACTIVATIONS[activation](hidden)
    return torch.einsum("nr,nrd->nd", coefficients, up[expert_ids].to(dtype)).to(x.dtype)
