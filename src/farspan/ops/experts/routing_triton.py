"""Product keys through Triton kernels: the choice is one node, the gradient of the chosen scores another."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._library import register_node
from farspan.ops.experts import routing_kernels as kernels
from farspan.ops.experts.torch import candidate_ranks

# Keys of a program of the gradient.
KEYS = 128


def product_key_topk_triton(scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `product_key_topk`; serves what the public function lets pass."""
    keys = scores_x.shape[-1]
    chosen_x, chosen_y = choose_node(scores_x.detach().contiguous(), scores_y.detach().contiguous(), k)
    scores = _Picked.apply(scores_x, chosen_x) + _Picked.apply(scores_y, chosen_y)
    return scores, chosen_x * keys + chosen_y


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(chosen)
        ctx.keys = scores.shape[-1]
        return scores.gather(-1, chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (chosen,) = ctx.saved_tensors
        return _Spread.apply(gradients[0], chosen, ctx.keys), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, chosen: Tensor, keys: int) -> Tensor:
        ctx.save_for_backward(chosen)
        out: Tensor = spread_node(gradient.contiguous(), chosen, keys)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (chosen,) = ctx.saved_tensors
        return _Picked.apply(gradients[0], chosen), None, None


@functools.cache
def _ranks(k: int, keys: int, device: torch.device) -> Tensor:
    # From the host: what is made while a CUDA graph is captured must not outlive it.
    return candidate_ranks(k, keys, torch.device("cpu")).to(device, torch.int32)


def _choose(scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    chosen = _choose_room(scores_x, scores_y, k)
    rows, keys = chosen[0].numel() // k, scores_x.shape[-1]
    if rows:
        ranks, length = _ranks(k, keys, scores_x.device), triton.next_power_of_2(keys)
        most, sums = triton.next_power_of_2(k), triton.next_power_of_2(ranks.shape[1])
        with torch.cuda.device_of(scores_x):
            kernels.topk_kernel[(rows,)](
                scores_x, scores_y, ranks, *chosen, keys, k, ranks.shape[1], WIDE=scores_x.dtype == torch.float32,
                BP=length, BA=min(most, length), BC=sums, BK=most, num_warps=1 if max(length, sums) <= 512 else 4,
            )  # fmt: skip
    return chosen


def _choose_room(scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*scores_x.shape[:-1], k)
    return scores_x.new_empty(shape, dtype=torch.int64), scores_x.new_empty(shape, dtype=torch.int64)


def _spread(gradient: Tensor, chosen: Tensor, keys: int) -> Tensor:
    out, k = _spread_room(gradient, chosen, keys), chosen.shape[-1]
    if out.numel():
        with torch.cuda.device_of(out):
            kernels.spread_kernel[(out.numel() // keys, triton.cdiv(keys, KEYS))](
                gradient, chosen, out, keys, k, BK=triton.next_power_of_2(k), BP=KEYS, num_warps=4
            )
    return out


def _spread_room(gradient: Tensor, chosen: Tensor, keys: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], keys)


choose_node = register_node(
    "product_key_choose(Tensor scores_x, Tensor scores_y, int k) -> (Tensor, Tensor)", _choose, _choose_room
)
spread_node = register_node(
    "product_key_spread(Tensor gradient, Tensor chosen, int keys) -> Tensor", _spread, _spread_room
)
