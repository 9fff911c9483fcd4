"""Product keys through Triton kernels: the choice is one node, the gradient of the chosen scores another."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.experts import routing_kernels as kernels
from farspan.ops.experts.torch import candidate_ranks

# Keys and warps of a program of the gradient.
SPREAD = 128, 1


def product_key_topk_triton(scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `product_key_topk`; serves what the public function lets pass."""
    best, ids = _Choice.apply(scores_x, scores_y, k)
    return best, ids


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best, ids = choose_node(scores_x, scores_y, k)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)  # of the ids it would be zeros
        ctx.save_for_backward(ids)
        ctx.keys = scores_x.shape[-1]
        return best, ids

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return *_Spread.apply(gradients[0], ids, ctx.keys), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, ids: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.keys = keys
        d_x, d_y = spread_node(gradient.contiguous(), ids, keys)
        return d_x, d_y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        d_x, d_y = gradients
        return d_x.gather(-1, ids // ctx.keys) + d_y.gather(-1, ids % ctx.keys), None, None


@functools.cache
def _ranks(k: int, keys: int, device: torch.device) -> Tensor:
    # From the host: what is made while a CUDA graph is captured must not outlive it.
    return candidate_ranks(k, keys, torch.device("cpu")).to(device, torch.int32)


def _choose(scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, ids = _choose_room(scores_x, scores_y, k)
    if ids.numel():
        with torch.cuda.device_of(ids):
            keys = scores_x.shape[-1]
            compile_ahead(("product keys", ids.device, keys, k, best.dtype), lambda: _rehearse(scores_x, k))
            _run(scores_x, scores_y, _ranks(k, keys, ids.device), best, ids)
    return best, ids


def _run(scores_x: Tensor, scores_y: Tensor, ranks: Tensor, best: Tensor, ids: Tensor) -> None:
    keys, k = scores_x.shape[-1], ids.shape[-1]
    x, y = _rows(scores_x), _rows(scores_y)
    constants = _choice_constants(keys, k, ranks.shape[1], best.dtype == torch.float32)
    arguments = x, y, ranks, best, ids, x.stride(0), y.stride(0), keys, k, ranks.shape[1]
    warps = 1 if max(constants["BP"], constants["BC"]) <= 1024 else 4
    launch(kernels.topk_kernel, (len(x),), arguments, constants, warps)


def _rows(scores: Tensor) -> Tensor:
    """`[N · H, P]`, the keys side by side."""
    scores = scores.flatten(0, 1)
    return scores if scores.stride(1) == 1 else scores.contiguous()


def _choose_room(scores_x: Tensor, scores_y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*scores_x.shape[:-1], k)
    return scores_x.new_empty(shape), scores_x.new_empty(shape, dtype=torch.int64)


def _spread(gradient: Tensor, ids: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    results = _spread_room(gradient, ids, keys)
    if results[0].numel():
        with torch.cuda.device_of(gradient):
            _run_spread(gradient, ids, *results)
    return results


def _run_spread(gradient: Tensor, ids: Tensor, d_x: Tensor, d_y: Tensor) -> None:
    keys, k = d_x.shape[-1], ids.shape[-1]
    constants = _spread_constants(k, SPREAD[0])
    grid = d_x.numel() // keys, triton.cdiv(keys, constants["BP"])
    launch(kernels.spread_kernel, grid, (gradient, ids, d_x, d_y, keys, k), constants, SPREAD[1])


def _spread_room(gradient: Tensor, ids: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    shape = (*gradient.shape[:-1], keys)
    return gradient.new_empty(shape), gradient.new_empty(shape)


def _rehearse(scores: Tensor, k: int) -> None:
    """Makes both launches for one token and head."""
    scores, keys = scores[:1, :1], scores.shape[-1]
    best, ids = _choose_room(scores, scores, k)
    _run(scores, scores, _ranks(k, keys, scores.device), best, ids)
    _run_spread(best, ids, *_spread_room(best, ids, keys))


@functools.cache
def _choice_constants(keys: int, k: int, candidates: int, wide: bool) -> Constants:
    length, most = triton.next_power_of_2(keys), triton.next_power_of_2(k)
    return Constants(WIDE=wide, BP=length, BA=min(most, length), BC=triton.next_power_of_2(candidates), BK=most)


@functools.cache
def _spread_constants(k: int, keys: int) -> Constants:
    return Constants(BK=triton.next_power_of_2(k), BP=keys)


choose_node = register_node(
    "product_key_choose(Tensor scores_x, Tensor scores_y, int k) -> (Tensor, Tensor)", _choose, _choose_room
)
spread_node = register_node(
    "product_key_spread(Tensor gradient, Tensor ids, int keys) -> (Tensor, Tensor)", _spread, _spread_room
)
