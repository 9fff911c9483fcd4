"""Chooses the block sizes of kernels by measuring on this card."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from farspan.evaluation.op_cases import CASES
from farspan.evaluation.op_speed import device_time, steps
from farspan.evaluation.op_workload import Workload
from farspan.ops import _tiles
from farspan.ops._tiles import Tile

TUNED = (
    "metala", "gated_linear", "cosine", "ssd", "short_convolution", "dilated", "dilated_bias", "dynamic_mask",
    "cdmoe",
)  # fmt: skip
# A tile replaces the shipped one when it saves this share of the time, which is more than runs differ by.
LEAST_GAIN = 0.03
# Largest difference from what the shipped tiles compute, relative to the largest entry: sums in another order.
SAME = 0.02

Report = Callable[[str, Tile, float], None]


def tune(names: Sequence[str], dtype: torch.dtype, device: torch.device, report: Report) -> dict[str, Tile]:
    """Measures the candidates of every kernel that the operators use, one kernel after the other.

    A candidate counts only if outputs and gradients are those of the shipped tiles. Compilers reject some and get
    others wrong; these are passed over.

    Args:
        names: some of `TUNED`; measured at 16x2048 and 1x32768.
        dtype: type of the inputs.
        device: the card.
        report: called with the kernel's key, the tile and its time relative to the shipped one's, for every candidate.

    Returns:
        The tiles that are better than the shipped ones, by key.

    Cost: one compilation and some fifty runs for every candidate and shape.
    """
    workloads = [CASES[name].make(*shape, dtype, device) for name in names for shape in ((16, 2048), (1, 32768))]
    users: dict[str, list[Workload]] = {}
    options: dict[str, list[Tile]] = {}
    for workload in workloads:
        _tiles.forget()
        _gradients(workload)
        for key, found in _tiles.candidates().items():
            options[key] = found
            users.setdefault(key, []).append(workload)
    best: dict[str, Tile] = {}
    for key, found in options.items():
        with _tiles.trial(best | {key: found[0]}):
            wanted = [_gradients(workload) for workload in users[key]]
            shipped = [_time(workload) for workload in users[key]]
        fastest = 1 - LEAST_GAIN
        for tile in found[1:]:
            with _tiles.trial(best | {key: tile}):
                ratio = _ratio(users[key], wanted, shipped)
            report(key, tile, ratio)
            if ratio < fastest:
                fastest, best[key] = ratio, tile
    return best


def _ratio(users: Sequence[Workload], wanted: Sequence[list[Tensor]], shipped: Sequence[float]) -> float:
    """The geometric mean of the times over those of the shipped tiles; infinite for what fails or differs."""
    from triton.errors import TritonError

    logs = 0.0
    for workload, right, before in zip(users, wanted, shipped, strict=True):
        try:
            if not all(_same(x, y) for x, y in zip(_gradients(workload), right, strict=True)):
                return math.inf
            logs += math.log(_time(workload) / before)
        except (TritonError, RuntimeError):
            return math.inf
    return math.exp(logs / len(users))


def _gradients(workload: Workload) -> list[Tensor]:
    """The output and all gradients for a fixed weighting of the output."""
    workload.forget()
    out = workload.call(workload.leaves)
    generator = torch.Generator(out.device).manual_seed(3)
    out.backward(torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype))
    found = [out.detach(), *(leaf.grad for leaf in workload.leaves.values() if leaf.grad is not None)]
    workload.forget()
    return found


def _same(x: Tensor, y: Tensor) -> bool:
    return bool((x.float() - y.float()).abs().max() <= SAME * y.float().abs().max())


def _time(workload: Workload) -> float:
    both = steps(workload)[1]
    assert both is not None  # every operator that is tuned has gradients
    return device_time(both)
