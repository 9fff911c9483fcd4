"""Retrieved experts through Triton kernels: the three maps, each a node of its own."""

import torch
import triton
from torch import Tensor

from farspan.ops._library import register_node
from farspan.ops.experts import kernels
from farspan.ops.experts.torch import Maps, compose

# Rows read together, and channels of a program.
ROWS, CHANNELS = 16, 512


def retrieved_experts_triton(
    x: Tensor, expert_ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, *, activation: str
) -> Tensor:
    """See `retrieved_experts`."""
    down, up = down.contiguous(), up.contiguous()
    return compose(x, expert_ids.contiguous(), weights, down, up, activation, KERNELS)


def _sizes(width: int) -> dict[str, int]:
    return {"D": width, "BR": ROWS, "BD": min(CHANNELS, triton.next_power_of_2(width)), "num_warps": 4}


def _dots(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    out = _dots_room(x, ids, table)
    if out.numel():
        with torch.cuda.device_of(x):
            grid = (len(ids), triton.cdiv(ids.shape[1], ROWS))
            kernels.dots_kernel[grid](x.contiguous(), ids, table.contiguous(), out, ids.shape[1], **_sizes(x.shape[1]))
    return out


def _mix(coefficients: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    out = _mix_room(coefficients, ids, table)
    if out.numel():
        sizes = _sizes(table.shape[1])
        with torch.cuda.device_of(table):
            grid = (len(ids), triton.cdiv(table.shape[1], sizes["BD"]))
            kernels.mix_kernel[grid](coefficients.contiguous(), ids, table.contiguous(), out, ids.shape[1], **sizes)
    return out


def _gather(coefficients: Tensor, ids: Tensor, order: Tensor, begins: Tensor, x: Tensor) -> Tensor:
    out = _gather_room(coefficients, ids, order, begins, x)
    if out.numel():
        sizes = _sizes(x.shape[1])
        with torch.cuda.device_of(x):
            grid = (len(out), triton.cdiv(x.shape[1], sizes["BD"]))
            kernels.gather_kernel[grid](
                coefficients.contiguous(), order, begins, x.contiguous(), out, ids.shape[1], **sizes
            )
    return out


def _dots_room(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return x.new_empty(ids.shape, dtype=torch.float32)


def _mix_room(coefficients: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(len(ids), table.shape[1])


def _gather_room(coefficients: Tensor, ids: Tensor, order: Tensor, begins: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(len(begins) - 1, x.shape[1])


KERNELS = Maps(
    register_node("experts_dots(Tensor x, Tensor ids, Tensor table) -> Tensor", _dots, _dots_room),
    register_node("experts_mix(Tensor coefficients, Tensor ids, Tensor table) -> Tensor", _mix, _mix_room),
    register_node(
        "experts_gather(Tensor coefficients, Tensor ids, Tensor order, Tensor begins, Tensor x) -> Tensor",
        _gather,
        _gather_room,
    ),
)
