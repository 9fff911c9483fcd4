"""Dynamic mask attention on a GPU: expiry, lanes, and attention that touches live keys alone."""

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import plain_backward
from farspan.ops._launch import INTERPRETED, Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.dynamic_mask import expiry_kernels, kernels
from farspan.ops.dynamic_mask.blocks import HIDDEN
from farspan.ops.dynamic_mask.expiry import (
    documents,
    in_blocks,
    in_window,
    inverse,
    lanes_of_blocks,
    longest_document,
    order_of,
    predecessors,
)
from farspan.ops.dynamic_mask.reference import Selection
from farspan.ops.dynamic_mask.torch import candidates, ranking_of

# Queries of a block, lanes of a tile, keys of a block of the order, places looked at together.
ROWS, LANES, ORDERED, PLACES = 64, 64, 64, 1024
# Numbers of a block in float32, whose exact products take three operands each, in registers.
FLOAT32_BLOCK = 2048
# Programs along the second axis of a grid, on which heads and rows of the batch lie: CUDA takes no more.
PROGRAMS = 65535
# Warps and stages that keep in registers: before Hopper heads of up to 64 channels, from there on wider ones.
OLDER = {"attend_kernel": (8, 3), "query_gradient_kernel": (8, 2), "lane_gradient_kernel": (4, 2)}
WIDER = {"lane_gradient_kernel": (8, 3)}
# Warp-group matrix instructions fail on blocks of 32 columns.
NARROWEST = 64
DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
LOG2E = 1.4426950408889634


def dynamic_mask_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float, selection: Selection
) -> Tensor:
    """See `dynamic_mask_attention`; serves what `option_limits` lets pass."""
    most = PROGRAMS // q.shape[2]
    if len(q) > most:
        parts = [slice(first, first + most) for first in range(0, len(q), most)]
        outs = [
            dynamic_mask_attention_triton(q[x], k[x], v[x], bias[x], scale=scale, selection=_of_rows(selection, x))
            for x in parts
        ]
        return torch.cat(outs)
    units, given = max(k.shape[2], bias.shape[2]), v.dtype
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), given)
    if not torch.compiler.is_compiling():
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias))
        key = q.device, dtype, bias.dtype, q.shape[2:], k.shape[2:], v.shape[3], bias.shape[2]
        smoothed = selection.block_size is not None
        forms = selection.cu_seqlens is not None, smoothed or selection.window is not None, smoothed, trains
        rehearse = functools.partial(_rehearse, q, k, v, bias, dtype, *forms)
        compile_ahead(("dynamic mask", *forms, *key), rehearse)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    bias = candidates(bias, selection)
    sizes = q.shape[1], units, selection.keep, selection.window, selection.block_size, _block_length(q, v)
    plan = plan_node(ranking_of(bias.detach(), selection), bias.detach(), selection.cu_seqlens, *sizes)
    by_unit = bias.float().clamp(min=HIDDEN).transpose(1, 2)
    by_unit = by_unit.repeat_interleave(units // bias.shape[2], dim=1).contiguous()
    out: Tensor = _Lanes.apply(q, k, v, by_unit, *plan, scale)
    return out.to(given)


def _of_rows(selection: Selection, rows: slice) -> Selection:
    """The selection of some rows of the batch."""
    mask, ranking = (x if x is None else x[rows] for x in (selection.key_mask, selection.ranking))
    return replace(selection, key_mask=mask, ranking=ranking)


def _rehearse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    packed: bool,
    limited: bool,
    smoothed: bool,
    trains: bool,
) -> None:
    """Every launch of a call and of its gradient, on little."""
    length, units = 2 * ROWS, max(k.shape[2], bias.shape[2])
    q, k, v = (x.new_zeros(1, length, *x.shape[2:], dtype=dtype) for x in (q, k, v))
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=q.device) if packed else None
    ranking, by_unit = bias.new_zeros(1, length, bias.shape[2]), q.new_zeros(1, units, length, dtype=torch.float32)
    if smoothed:  # nothing is launched here, and what follows would read what that leaves
        expiry_triton(ranking, 1, cu_seqlens)
    plan = _plan(ranking, ranking, cu_seqlens, length, units, 1, 2 if limited else None, None, _block_length(q, v))
    saved = _attend(q, k, v, by_unit, *plan, 1.0)
    if trains:
        _attend_gradient(torch.empty_like(saved[0]), q, k, v, by_unit, *plan, *saved, 1.0)


def expiry_triton(bias: Tensor, keep: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """`expiry` as rows, `[B·M, S]` int32."""
    batch, length, heads = bias.shape
    if keep >= longest_document(length, cu_seqlens):
        return documents(length, cu_seqlens, bias.device)[1].repeat(batch * heads, 1)
    order = order_of(bias, cu_seqlens)
    ranks, expires = inverse(order), torch.empty(order.shape, dtype=torch.int32, device=bias.device)
    blocks, table = _ordered_blocks(length, cu_seqlens, expires)
    windows = torch.empty(len(expires), blocks, ORDERED, dtype=torch.int32, device=bias.device)
    grid, packed = (blocks, len(expires)), cu_seqlens is not None
    with torch.cuda.device_of(bias):
        before = ranks, windows, table, length, keep
        _launch(expiry_kernels.window_kernel, grid, before, N=ORDERED, BX=PLACES, PACKED=packed)
        within = order, windows, table, expires, length
        _launch(expiry_kernels.expiry_kernel, grid, within, N=ORDERED, PACKED=packed)
    return expires


def _ordered_blocks(length: int, cu_seqlens: Tensor | None, other: Tensor) -> tuple[int, Tensor]:
    """Number of blocks of the order and, with documents, where each lies: start and end of its document, its number."""
    if cu_seqlens is None:
        return triton.cdiv(length, ORDERED), other

    def build() -> Tensor:
        sequence, number = varlen.chunk_indices(cu_seqlens, ORDERED).unbind(-1)
        return torch.stack((cu_seqlens[sequence.long()], cu_seqlens[sequence.long() + 1], number), dim=-1)

    table: Tensor = varlen.remember(cu_seqlens, ("ordered blocks", ORDERED), build)
    return len(table), table


def _block_length(q: Tensor, v: Tensor) -> int:
    """C, queries of a block; as many keys of a tile in float32."""
    return ROWS if q.dtype.itemsize == 2 else min(ROWS, FLOAT32_BLOCK // max(map(_padded, (q, v))))


def _padded(x: Tensor) -> int:
    return max(NARROWEST, triton.next_power_of_2(x.shape[-1]))


def _plan(
    ranking: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor | None,
    queries: int,
    units: int,
    keep: int,
    window: int | None,
    smoothing: int | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expiry `[B·U, S]`, 0 for hidden keys; ranks `[B·U, S]`, limits `[B·U, T]` of a window or of blocks, otherwise
    empty; keys of the lanes `[B·U, blocks, W]`, −1 for none; int32."""
    hidden, before, found = bias.isneginf().transpose(1, 2).flatten(0, 1), None, None
    if window is not None:
        found = in_window(ranking, keep, window, cu_seqlens)
        keep = window
    else:
        expires = expiry_triton(ranking, keep, cu_seqlens)
    if smoothing is not None:
        chosen = expires.masked_fill_(hidden, 0).unflatten(0, bias.shape[::2]).transpose(1, 2)
        found = in_blocks(chosen, smoothing, cu_seqlens)
        keep = lanes_of_blocks(keep, smoothing, bias.shape[1])
    if found is None:
        ranks, limits = expires.new_empty(0), expires.new_empty(0)
    else:
        expires, ranks, limits = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in found)
        limits = limits[:, -queries:].contiguous()
    if smoothing is not None:
        before = predecessors(expires, keep, documents(bias.shape[1], cu_seqlens, bias.device)[0])
    table = _lanes(expires, cu_seqlens, queries, keep, size, before)
    expires = expires.masked_fill_(hidden, 0)
    batch, times = bias.shape[0], units // bias.shape[2]
    expires, ranks, limits, table = (_by_unit(x, batch, times) for x in (expires, ranks, limits, table))
    return expires, ranks, limits, table


def _by_unit(x: Tensor, batch: int, times: int) -> Tensor:
    return (
        x if times == 1 or not x.numel() else x.unflatten(0, (batch, -1)).repeat_interleave(times, dim=1).flatten(0, 1)
    )


def _lanes(
    expires: Tensor, cu_seqlens: Tensor | None, queries: int, keep: int, size: int, before: Tensor | None
) -> Tensor:
    """The keys of the lanes; `before` is who held each key's lane, by default the key that it displaces."""
    rows, keys = expires.shape
    starts, ends = documents(keys, cu_seqlens, expires.device)
    blocks, lanes = triton.cdiv(queries, size), triton.cdiv(keep, LANES) * LANES
    table = torch.full((rows, blocks, lanes), -1, dtype=torch.int32, device=expires.device)
    grid, hops = (triton.cdiv(keys, PLACES), rows), ((keys - 1).bit_length() + 1) // 2
    with torch.cuda.device_of(expires):
        if before is None:
            before = torch.arange(keys, dtype=torch.int32, device=expires.device).repeat(rows, 1)
            _launch(expiry_kernels.link_kernel, grid, (expires, ends, before, keys), BX=PLACES)
        for _ in range(hops):
            _launch(expiry_kernels.hop_kernel, grid, (before, keys), BX=PLACES)
        arguments = before, starts, table, keys, keep, keys - queries, blocks, lanes
        _launch(expiry_kernels.birth_kernel, grid, arguments, C=size, BX=PLACES)
        _launch(expiry_kernels.newest_kernel, (lanes // LANES, rows), (table, blocks, lanes), BM=32, BL=LANES)
    return table


class _Lanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *plan: Any) -> Tensor:
        *tables, ctx.scale = plan
        out, lse = attend_node(q, k, v, bias, *plan)
        ctx.save_for_backward(q, k, v, bias, *tables, out, lse)
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = attend_gradient_node(d_out.contiguous(), *ctx.saved_tensors, ctx.scale)
        return (*gradients, *[None] * 5)


class _Call:
    """Sizes of one call as the kernels take them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, limits: Tensor, table: Tensor) -> None:
        (self.batch, queries, self.heads, width), (keys, groups), values = q.shape, k.shape[1:3], v.shape[3]
        self.units, self.blocks, lanes = bias.shape[1], table.shape[1], table.shape[2]
        # Two heads that share keys make the 128 rows of a tile. Sums of keys stay in registers: one head at a time.
        wide, narrow = q.dtype == torch.float32, max(width, values) <= NARROWEST
        older = not INTERPRETED and torch.cuda.get_device_capability(q.device)[0] < 9
        turned = wide or (older and not narrow)
        self.pair = 2 if self.heads // self.units % 2 == 0 and not turned else 1
        self.past = keys - queries
        self.numbers = (self.batch, queries, keys, self.heads, groups, self.units)
        self.lanes = (self.blocks, lanes, self.past)
        self.query_grid = self.blocks, self.batch * self.heads // self.pair
        size = _block_length(q, v)
        tile = size if wide else LANES
        self.warps = 4 if narrow or wide else 8
        self.schedules = {} if wide or older != narrow else OLDER if older else WIDER
        self.sizes = {
            "D": width,
            "V": values,
            "BD": _padded(q),
            "BV": _padded(v),
            "C": size,
            "BN": tile,
            "BL": tile,
            "LIMITED": limits.numel() > 0,
            "TURNED": turned,
            "DOT": tl.float32 if INTERPRETED else DOT[q.dtype],
            "PRECISION": "tf32x3" if wide else "ieee",
        }

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int],
        arguments: tuple[Any, ...],
        heads: int,
        stages: int,
        lanes: bool = True,
    ) -> None:
        numbers = (*self.numbers, *self.lanes) if lanes else (*self.numbers, self.past)
        warps, stages = self.schedules.get(kernel.__name__, (self.warps, stages))
        _launch(kernel, grid, (*arguments, *numbers), warps, stages, QB=heads, **self.sizes)


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], warps: int = 4, stages: int = 3, **switches: Any
) -> None:
    launch(kernel, grid, arguments, _constants(kernel, *switches.items()), warps, stages)


@functools.cache
def _constants(kernel: Any, *switches: tuple[str, Any]) -> Constants:
    given = dict(switches)
    return Constants({name: given[name] for name in kernel.arg_names if name in given})


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    expires: Tensor,
    ranks: Tensor,
    limits: Tensor,
    table: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    call = _Call(q, k, v, bias, limits, table)
    out, lse = _room(q, k, v)
    tensors = q, k, v, bias, expires, ranks, limits, table, out, lse, scale * LOG2E
    with torch.cuda.device_of(q):
        call.launch(kernels.attend_kernel, call.query_grid, tensors, call.pair, 3)
    return out, lse


def _attend_gradient(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    expires: Tensor,
    ranks: Tensor,
    limits: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, delta, dq = _Call(q, k, v, bias, limits, table), torch.empty_like(lse), torch.empty_like(q)
    by_unit = (*k.shape[:2], call.units)
    shapes = ((*by_unit, k.shape[3]), (*by_unit, v.shape[3]), bias.shape)
    dk, dv, d_bias = (torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes)
    if call.past:  # keys before the first query have no block of their own
        for gradient in (dk, dv, d_bias):
            gradient.zero_()
    inputs, scales, rows = (
        (q, k, v, bias, expires, ranks, limits),
        (scale * LOG2E, float(scale)),
        call.batch * call.units,
    )
    keys = lse, delta, d_out, dk, dv, d_bias, *scales
    queries = table, out, lse, d_out, dq, delta, *scales
    with torch.cuda.device_of(q):
        call.launch(kernels.query_gradient_kernel, call.query_grid, (*inputs, *queries), call.pair, 2)
        call.launch(kernels.own_gradient_kernel, (call.blocks, rows), (*inputs, *keys), 1, 1, lanes=False)
        grid = call.lanes[1] // call.sizes["BL"], rows
        call.launch(kernels.lane_gradient_kernel, grid, (*inputs, table, *keys), 1, 1)
    if call.units > k.shape[2]:
        dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_bias


def _room(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return v.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(batch, heads, queries, dtype=torch.float32)


def _gradient_room(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(bias)


def _plan_room(
    ranking: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor | None,
    queries: int,
    units: int,
    keep: int,
    window: int | None,
    smoothing: int | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, keys, blocks = ranking.shape[0] * units, ranking.shape[1], -(-queries // size)
    if smoothing is not None:
        keep = lanes_of_blocks(keep, smoothing, keys)
    lanes = -(-(keep if window is None else window) // LANES) * LANES
    make = functools.partial(ranking.new_empty, dtype=torch.int32)
    whole = window is None and smoothing is None
    limited = (make(0), make(0)) if whole else (make(rows, keys), make(rows, queries))
    return make(rows, keys), *limited, make(rows, blocks, lanes)


plan_node = register_node(
    "dynamic_mask_plan(Tensor ranking, Tensor bias, Tensor? cu_seqlens, SymInt queries, int units, int keep, "
    "int? window, int? smoothing, int size) -> (Tensor expires, Tensor ranks, Tensor limits, Tensor table)",
    _plan,
    _plan_room,
)
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor bias, Tensor expires, Tensor ranks, Tensor limits, Tensor table"
attend_node = register_node(
    f"dynamic_mask_lanes({_INPUTS}, float scale) -> (Tensor out, Tensor lse)",
    _attend,
    _room,
)
attend_gradient_node = register_node(
    f"dynamic_mask_lanes_gradient(Tensor d_out, {_INPUTS}, Tensor out, Tensor lse, float scale) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor d_bias)",
    _attend_gradient,
    _gradient_room,
)
