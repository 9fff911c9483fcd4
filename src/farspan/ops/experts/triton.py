"""Retrieved experts through Triton kernels: two nodes, forward and backward."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from farspan.ops._library import register_node
from farspan.ops.experts import kernels
from farspan.ops.experts.torch import Slots, retrieved_experts_bags

# Rows read together and warps of a program: of dots, of mixtures (with the channels of a program), of gradients.
DOTS, MIX, GRADIENT = (8, 4), (16, 512, 4), (4, 4)
# Slots of an expert that one program of the gradient goes through.
PIECE = 256


def retrieved_experts_triton(
    x: Tensor, expert_ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, *, activation: str
) -> Tensor:
    """See `retrieved_experts`."""
    rows = (t.contiguous() for t in (x.to(down.dtype), expert_ids, weights, down, up))
    out: Tensor = _Experts.apply(*rows, activation)
    return out.to(x.dtype)


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
            dx, dw, d_down, d_up = backward_node(dy.contiguous(), x, ids, weights, hidden, down, up, ctx.activation)
        return dx, None, dw, d_down, d_up, None


def _forward(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    out, hidden = _forward_room(x, ids, weights, down, up, activation)
    if ids.numel():
        width, coefficients = x.shape[1], torch.empty_like(hidden)
        with torch.cuda.device_of(x):
            rows, warps = DOTS
            kernels.dots_kernel[(len(ids), triton.cdiv(ids.shape[1], rows))](
                x, ids, weights, down, hidden, coefficients, ids.shape[1],
                ACT=activation, D=width, BR=rows, BD=triton.next_power_of_2(width), num_warps=warps,
            )  # fmt: skip
            _mix(coefficients, ids, up, out)
    return out, hidden


def _forward_room(
    x: Tensor, ids: Tensor, weights: Tensor, down: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return up.new_empty(x.shape), x.new_empty(ids.shape, dtype=torch.float32)


def _mix(coefficients: Tensor, ids: Tensor, table: Tensor, out: Tensor) -> None:
    rows, channels, warps = MIX
    width = table.shape[1]
    channels = min(channels, triton.next_power_of_2(width))
    kernels.mix_kernel[(len(ids), triton.cdiv(width, channels))](
        coefficients, ids, table, out, ids.shape[1], D=width, BR=rows, BD=channels, num_warps=warps
    )


class _Pieces(NamedTuple):
    """The slots of each expert, cut into pieces of at most PIECE.

    Attributes:
        order: `[N·R]`, the slots in the order of their experts; those of one expert in the order of tokens.
        begins: `[E + 1]`, where the slots of each expert begin in it.
        piece_ends: `[E]`, how many pieces there are up to each expert's last.
        part_ends: `[E]`, the same, counting those of experts with several pieces alone.
        expert_of_piece: for each piece that there may be its expert; E behind the last.
        expert_of_part: the same among the pieces of experts with several.
    """

    order: Tensor
    begins: Tensor
    piece_ends: Tensor
    part_ends: Tensor
    expert_of_piece: Tensor
    expert_of_part: Tensor

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> "_Pieces":
        _, order, begins = Slots.of(ids, experts)
        begins = begins.int()
        pieces = (begins.diff() + (PIECE - 1)) // PIECE
        piece_ends = pieces.cumsum(0)
        part_ends = (pieces * (pieces > 1)).cumsum(0)
        numbers = torch.arange(min(experts, len(order)) + len(order) // PIECE, device=ids.device)
        of_part = torch.searchsorted(part_ends, numbers[: 2 * len(order) // PIECE], right=True)
        return cls(order, begins, piece_ends, part_ends, torch.searchsorted(piece_ends, numbers, right=True), of_part)


def _backward(
    dy: Tensor, x: Tensor, ids: Tensor, weights: Tensor, hidden: Tensor, down: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dw = torch.empty_like(x), torch.empty_like(weights)
    d_down, d_up = torch.zeros_like(down), torch.zeros_like(up)
    if not ids.numel():
        return dx.zero_(), dw, d_down, d_up
    order, begins, piece_ends, part_ends, of_piece, of_part = _Pieces.of(ids, len(down))
    (experts, width), d_hidden = down.shape, torch.empty_like(hidden)
    parts = x.new_empty(max(1, len(of_part)), 2, width, dtype=torch.float32)
    rows, warps = GRADIENT
    sizes = {"D": width, "PIECE": PIECE, "BD": triton.next_power_of_2(width)}
    with torch.cuda.device_of(x):
        kernels.gradient_kernel[(len(of_piece),)](
            x, dy, weights, hidden, up, order, begins, piece_ends, part_ends, of_piece, d_hidden, dw, d_down, d_up,
            parts, ids.shape[1], experts, ACT=activation, BR=rows, num_warps=warps, **sizes,
        )  # fmt: skip
        if len(of_part):
            kernels.join_kernel[(len(of_part),)](
                parts, begins, part_ends, of_part, d_down, d_up, experts, num_warps=warps, **sizes
            )
        _mix(d_hidden, ids, down, dx)
    return dx, dw, d_down, d_up


def _backward_room(
    dy: Tensor, x: Tensor, ids: Tensor, weights: Tensor, hidden: Tensor, down: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(down), torch.empty_like(up)


forward_node = register_node(
    "experts_forward(Tensor x, Tensor ids, Tensor weights, Tensor down, Tensor up, str activation) -> (Tensor, Tensor)",
    _forward,
    _forward_room,
)
backward_node = register_node(
    "experts_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, Tensor hidden, Tensor down, Tensor up,"
    " str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_room,
)
