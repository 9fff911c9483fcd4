"""Retrieved experts through Triton kernels: two nodes, forward and backward."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.experts import kernels
from farspan.ops.experts.torch import Slots, retrieved_experts_bags

# Rows read together, channels of a program, its warps for each 1024 of them, the depth of its pipeline: of dots, of
# mixtures, of gradients (which hold whole rows), of sums of pieces.
DOTS, MIX, GRADIENT, JOIN = (4, 1024, 1, 1), (8, 256, 1, 1), (1, 8192, 1, 3), (1, 256, 1, 1)
# Slots of a token that one program of the dots goes through.
STRETCH = 16
# Slots of an expert that one program of the gradient goes through.
PIECE = 256


def retrieved_experts_triton(
    x: Tensor, expert_ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, *, activation: str
) -> Tensor:
    """See `retrieved_experts`; tokens and tables are read in their dtypes, as float32."""
    rows = (t.contiguous() for t in (x, expert_ids, weights, down, up))
    out: Tensor = _Experts.apply(*rows, activation)
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str) -> Tensor:
        out, hidden = forward_node(x, ids, weights, down, up, activation)
        ctx.save_for_backward(x, ids, weights, down, up, hidden)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, weights, down, up, hidden = ctx.saved_tensors
        (dy,) = gradients
        if torch.is_grad_enabled():  # the gradient will be differentiated: the maps in PyTorch can be
            out = retrieved_experts_bags(x, ids, weights, down, up, activation=ctx.activation)
            wanted = [t for t in (x, weights, down, up) if t.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, dy.to(out.dtype), create_graph=True))
            dx, dw, d_down, d_up = (next(found) if t.requires_grad else None for t in (x, weights, down, up))
        else:
            tables, options = any(ctx.needs_input_grad[3:5]), (hidden, down, up, ctx.activation)
            dx, dw, *found = backward_node(dy.contiguous(), x, ids, weights, *options, tables)
            d_down, d_up = found if tables else (None, None)
        return dx, None, dw, d_down, d_up, None


def _forward(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    results = _forward_room(x, ids, weights, down, up, activation)
    if ids.numel():
        with torch.cuda.device_of(x):
            key = x.device, x.shape[1], ids.shape[1], activation, *(t.dtype for t in (x, weights, down, up))
            compile_ahead(
                ("experts", *key), lambda: _rehearse(x[:1], ids[:1], weights[:1], down[:1], up[:1], activation)
            )
            _run(x, ids, weights, down, up, activation, results)
    return results


def _run(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str, results: tuple[Tensor, Tensor]
) -> None:
    out, hidden = results
    programs = len(x), triton.cdiv(ids.shape[1], STRETCH)
    arguments = x, ids, down, hidden, *ids.shape
    _launch(kernels.dots_kernel, programs, arguments, DOTS, x.shape[1], STRETCH=STRETCH)
    _mix(weights, hidden, ids, up, out, activation)


def _forward_room(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Room for the outputs, and for the pre-activations `[blocks of channels, N, R]`, whose sums they are."""
    return torch.empty_like(x), x.new_empty(_blocks(DOTS, x.shape[1]), *ids.shape, dtype=torch.float32)


def _mix(coefficients: Tensor, hidden: Tensor, ids: Tensor, vectors: Tensor, out: Tensor, activation: str) -> None:
    arguments = coefficients, hidden, ids, vectors, out, *ids.shape
    _launch(kernels.mix_kernel, (len(ids),), arguments, MIX, vectors.shape[1], ACT=activation, PARTS=len(hidden))


def _backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _backward_room(dy, x, ids, weights, hidden, down, up, activation, tables)
    if not ids.numel():
        for gradient in results:
            gradient.zero_()
        return results
    _, order, begins = Slots.of(ids, len(down))
    with torch.cuda.device_of(x):
        _run_backward(dy, x, ids, weights, hidden, down, up, activation, tables, order, begins, results)
    return results


def _run_backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    tables: bool,
    order: Tensor,
    begins: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    dx, dw, d_down, d_up = results
    (experts, width), pieces = down.shape, triton.cdiv(len(order), PIECE)
    sums, d_hidden = hidden.new_empty(pieces if tables else 0, 2, 2, width), hidden.new_empty(ids.shape)
    arguments: tuple[Any, ...] = (x, dy, weights, hidden, up, ids, order, begins, d_hidden, dw, d_down, d_up, sums)
    arguments += (len(ids), pieces)
    switches = {"R": ids.shape[1], "ACT": activation, "PARTS": len(hidden), "PIECE": PIECE, "TABLES": tables}
    _launch(kernels.gradient_kernel, (pieces + experts,), arguments, GRADIENT, width, **switches)
    if tables:
        arguments = sums, ids, order, begins, d_down, d_up
        _launch(kernels.join_kernel, (pieces,), arguments, JOIN, width, PIECE=PIECE)
    _mix(d_hidden, d_hidden.unsqueeze(0), ids, down, dx, "none")


def _backward_room(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients; none for those of tables that are not wanted."""
    d_down, d_up = (torch.empty_like(x) if tables else x.new_empty(0) for x in (down, up))
    return torch.empty_like(x), torch.empty_like(weights), d_down, d_up


def _rehearse(x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str) -> None:
    """Makes all launches for one token."""
    results = _forward_room(x, ids, weights, down, up, activation)
    _run(x, ids, weights, down, up, activation, results)
    backward = results[0], x, ids, weights, results[1], down, up, activation, True
    _run_backward(*backward, ids[0], ids[0], _backward_room(*backward))


def _launch(
    kernel: Any,
    programs: tuple[int, ...],
    arguments: tuple[Any, ...],
    tile: tuple[int, ...],
    width: int,
    **switches: Any,
) -> None:
    """Starts a kernel whose last axis of programs is the blocks of channels."""
    constants = _constants(kernel, tile, width, *switches.items())
    warps = tile[2] * triton.cdiv(constants["BD"], 1024)
    launch(kernel, (*programs, _blocks(tile, width)), arguments, constants, warps, tile[3])


def _blocks(tile: tuple[int, ...], width: int) -> int:
    return triton.cdiv(width, tile[1])


@functools.cache
def _constants(kernel: Any, tile: tuple[int, ...], width: int, *switches: tuple[str, Any]) -> Constants:
    rows, channels, _, stages = tile
    sizes = {"D": width, "BR": rows, "BD": min(channels, triton.next_power_of_2(width)), "STAGES": stages}
    given = dict(switches) | sizes
    return Constants({name: given[name] for name in kernel.arg_names if name in given})


forward_node = register_node(
    "experts_forward(Tensor x, Tensor ids, Tensor weights, Tensor down, Tensor up, str activation) -> (Tensor, Tensor)",
    _forward,
    _forward_room,
)
backward_node = register_node(
    "experts_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, Tensor hidden, Tensor down, Tensor up,"
    " str activation, bool tables) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_room,
)
