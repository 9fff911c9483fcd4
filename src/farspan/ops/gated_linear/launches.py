"""The launches of the kernels of gated linear attention and MetaLA, forward and backward."""

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from farspan.ops._launch import INTERPRETED, Constants, launch
from farspan.ops._tiles import measured, remembered
from farspan.ops.gated_linear import chunk_kernels, extreme_kernels, kernels
from farspan.ops.gated_linear.plan import Plan, plan_chunks
from farspan.ops.gated_linear.tiles import (
    CANDIDATES,
    NARROW,
    NARROWEST,
    SCAN,
    WIDEST,
    Tile,
    Tiles,
    chunk_of,
    extreme_gradient,
    family,
    tiles,
    whole,
)

# Numbers of a program of the row kernel.
ROW_NUMBERS = 4096
# Half of the range of the log decay in a chunk up to which one factorisation serves; exp of it must fit the dtype.
LIMIT = {torch.float16: 8.0, torch.bfloat16: 60.0, torch.float32: 60.0}
DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Form(NamedTuple):
    """What the kernels compute, beside what the tensors say.

    Attributes:
        scale: factor of the recurrent term.
        from_logits: whether the gate holds logits that give both decay and key, rather than log decays.
        normalizer: tau of the gate logits.
        inside: whether the augmentation's sigmoid encloses the product with v.
        normalize: whether every head is normalised over V.
        eps: epsilon of the normalisation.
    """

    scale: float
    from_logits: bool = False
    normalizer: float = 1.0
    inside: bool = True
    normalize: bool = False
    eps: float = 1e-5


class Back(NamedTuple):
    """What the walk in reverse takes and gives beside the gradients of states.

    Attributes:
        dv: receives the gradient of v, and has MetaLA's augmentation's share of it.
        states: the states in front of all chunks.
        initial: those in front of all sequences, in float32; None where `kept` is.
        kept: receives `rowsum(S~ dS~)` of all chunks, `[chunks, H, blocks of V, K]`; None leaves it to the chunks.
    """

    dv: Tensor
    states: Tensor
    initial: Tensor | None = None
    kept: Tensor | None = None


class Prepared(NamedTuple):
    """What `prepare_kernel` gives: queries and keys with their decays, centre and half range of chunks, MetaLA's u."""

    q: Tensor
    k: Tensor
    centre: Tensor
    half: Tensor
    u: Tensor


def run(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    results: tuple[Tensor, ...],
    plan: Plan,
    form: Form,
) -> None:
    """The launches of the forward pass, into the room for their results."""
    out, final, *rest, states, rstd = results
    prepared = Prepared(*rest)
    own_k, own_gate = q if k is None else k, q if gate is None else gate
    chunks, heads = plan.chunks.shape[0], q.shape[2]
    tiles, common = _tiles(q), _common(q, v, gate, weight, form)
    _launch(
        kernels.prepare_kernel, (chunks, heads), tiles.prepare, common,
        q, own_k, own_gate, q if weight is None else weight, *prepared, plan.chunks, form.scale, form.normalizer, heads,
    )  # fmt: skip
    _states(prepared.k, v, prepared, initial, states, final, plan, common)
    tile = tiles.output
    if weight is not None or form.normalize:
        tile = whole(tile, common["V_PADDED"])
    columns = min(tile[0], common["V_PADDED"])
    grid = (chunks, heads, -(-v.shape[-1] // columns))
    _launch(
        chunk_kernels.output_kernel, grid, tile, common,
        prepared.q, prepared.k, v, prepared.half, prepared.u, states, out, rstd, plan.chunks, form.eps, heads,
    )  # fmt: skip
    if gate is not None:
        _launch(
            extreme_kernels.extreme_output_kernel, (_many(plan), *grid[1:]), (columns, 8, 1, None), common,
            q, own_k, prepared.q, v, gate, prepared.half, prepared.u, states, out, rstd, plan.chunks, chunks,
            form.scale, form.normalizer, form.eps, heads, BK=NARROWEST,
        )  # fmt: skip


def run_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    out: Tensor,
    saved: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    plan: Plan,
    form: Form,
) -> None:
    """The launches of the backward pass, into the room for the gradients; of `weight`'s one share for each chunk."""
    dq, dk, dv, d_gate, shares, d_initial = results
    *rest, states, rstd = saved
    prepared = Prepared(*rest)
    tiles, common = _tiles(q), _common(q, v, gate, weight, form)
    du = torch.empty_like(prepared.u)
    if form.normalize or weight is not None:
        dy, rows, width = d_out, v.shape[0] * v.shape[1] * v.shape[2], common["V_PADDED"]
        d_out, height = torch.empty_like(dy) if form.normalize else dy, max(1, ROW_NUMBERS // width)
        _launch(
            chunk_kernels.row_kernel, (-(-rows // height),), (width, 4, 1, None), common,
            dy, out, rstd, v, prepared.u, d_out, dv, du, rows, BR=height,
        )  # fmt: skip
    chunks, heads = plan.chunks.shape[0], q.shape[2]
    d_states, back = torch.empty_like(states), Back(dv, states)
    blocks = -(-v.shape[3] // min(tiles.kept[0], common["V_PADDED"]))
    if gate is not None and initial is not None:
        # States are kept in 16 bits, but for those that are given: there the walk can do better.
        back = Back(dv, states, initial, du.new_empty(chunks, heads, blocks, q.shape[3]))
    kept, sums = du if back.kept is None else back.kept, {"KEPT": back.kept is not None, "BLOCKS": blocks}
    own_k, own_gate, own_weight = q if k is None else k, q if gate is None else gate, q if weight is None else weight
    d_key = dq if k is None else dk
    _states(prepared.q, d_out, prepared, d_final, d_states, d_initial, plan, common, back)
    device, size = q.get_device(), q.element_size()
    channels, together = gradient_block(family(device), size, common["BK"], common["V"], common["DECAY"])
    own = _device_tiles(device, channels, size).gradient
    _launch(
        chunk_kernels.gradient_kernel, (chunks, heads, common["BK"] // channels), own, common,
        q, own_k, prepared.q, prepared.k, v, own_gate, prepared.half, own_weight, d_out, states, d_states,
        dq, d_key, d_gate, du, shares, kept, plan.chunks, form.scale, form.normalizer, heads, BK=channels,
        TOGETHER=together, **sums,
    )  # fmt: skip
    if gate is not None:
        _launch(
            extreme_kernels.extreme_gradient_kernel, (_many(plan), heads), extreme_gradient(family(device)), common,
            q, own_k, prepared.k, v, gate, prepared.half, prepared.u, own_weight, d_out, states, d_states,
            dq, d_key, dv, d_gate, du, shares, kept, plan.chunks, chunks, form.scale, form.normalizer, heads,
            BK=NARROWEST, **sums,
        )  # fmt: skip


def _states(
    x: Tensor,
    y: Tensor,
    prepared: Prepared,
    start: Tensor | None,
    states: Tensor,
    end: Tensor,
    plan: Plan,
    common: Constants,
    back: Back | None = None,
) -> None:
    """The state in front of every chunk and after every sequence; in reverse their gradients and that of v."""
    reverse, (dv, before, initial, kept) = back is not None, back or Back(x, x)
    tiles, (heads, width, value_width) = _tiles(x), end.shape[1:]
    tile = tiles.state if kept is None else tiles.kept
    count = plan.segments.shape[0]
    grid = (count, heads, -(-value_width // min(tile[0], common["V_PADDED"])))

    def walk(start: Tensor | None, end: Tensor, lost: Tensor, stores: tuple[bool, bool, bool]) -> None:
        inside, last, lost_too = stores
        _launch(
            kernels.state_kernel, grid, tile, common,
            x, y, prepared.centre, prepared.half, end if start is None else start, end, lost, states, prepared.k,
            dv, before, end if initial is None else initial, end if kept is None else kept, plan.segments, heads,
            REVERSE=reverse, HAS_START=start is not None, STORE_STATES=inside, STORE_END=last, STORE_LOST=lost_too,
            STORE_VALUES=reverse and inside, KEPT=inside and kept is not None, STAGES=tile[2],
        )  # fmt: skip

    if plan.whole:
        walk(start, end, end, (True, True, False))
        return
    added, lost = end.new_empty(count, heads, width, value_width), end.new_empty(count, heads, width)
    walk(None, added, lost, (False, True, True))
    entering, block = torch.empty_like(added), 256
    _launch(
        kernels.scan_kernel, (plan.offsets.shape[0] - 1, heads, -(-width * value_width // block)), SCAN, common,
        added, lost, end if start is None else start, entering, end, plan.offsets, heads,
        BN=block, REVERSE=reverse, HAS_START=start is not None,
    )  # fmt: skip
    walk(entering, end, lost, (True, False, False))


def gradient_block(family: int, size: int, width: int, values: int, decay: int) -> tuple[int, bool]:
    """Channels of a program for gradients, and whether its products are written out rather than in a loop.

    Channels that decay by themselves share no more than `d_out v^T`: a program takes as many as registers hold.
    Hopper's products of 16 bits run on beside each other, written out, while registers last: for heads of few channels
    and values.
    """
    hopper = family > 8 and size == 2
    channels = width if decay < 2 else NARROWEST if hopper or size > 2 else NARROW
    return channels, hopper and width <= NARROWEST and values <= WIDEST


def plan_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Plan:
    return plan_chunks(q, cu_seqlens, chunk_of(q), q.shape[2] * -(-v.shape[3] // _tiles(q).state[0]))


def _tiles(q: Tensor) -> Tiles:
    return _device_tiles(q.get_device(), q.shape[-1], q.element_size())


@functools.cache
def _device_tiles(device: int, width: int, size: int) -> Tiles:
    shipped = tiles(family(device), _padded(width), size)
    if INTERPRETED:
        return shipped
    return Tiles(*(
        measured(f"gated_linear.{name}", (_padded(width), size), tile, CANDIDATES[name], device)
        for name, tile in shipped._asdict().items()
    ))  # fmt: skip


remembered(_device_tiles.cache_clear)


def _padded(width: int) -> int:
    return max(NARROWEST, 1 << (width - 1).bit_length())


def _many(plan: Plan) -> int:
    return -(-plan.chunks.shape[0] // extreme_kernels.MANY.value)


def _common(q: Tensor, v: Tensor, gate: Tensor | None, weight: Tensor | None, form: Form) -> Constants:
    decay = 3 if form.from_logits else 0 if gate is None else gate.dim() - 2
    switches = (decay, weight is not None, form.inside, form.normalize)
    return _constants(q.dtype, q.shape[3], v.shape[3], chunk_of(q), switches)


@functools.cache
def _constants(
    dtype: torch.dtype, width: int, value_width: int, chunk: int, switches: tuple[int, bool, bool, bool]
) -> Constants:
    """Compile-time arguments by name, for all kernels.

    The interpreter knows no 16-bit arithmetic that could be trusted, nor assembly.
    """
    exact = dtype == torch.float32
    named = dict(zip(("DECAY", "AUGMENT", "INSIDE", "NORMALIZE"), switches, strict=True))
    return Constants({
        "K": width, "BK": _padded(width), "V": value_width, "V_PADDED": _padded(value_width), "BT": chunk,
        "LIMIT": LIMIT[dtype], "FAST": 0 if exact else 1 if INTERPRETED else 2,
        "PART": tl.float32 if INTERPRETED else tl.bfloat16, "DOT": tl.float32 if INTERPRETED else DOT[dtype],
        "PRECISION": "tf32x3" if exact else "tf32", **named,
    })  # fmt: skip


def _launch(
    kernel: Any, grid: tuple[int, ...], tile: Tile, common: Constants, *arguments: Any, **more: bool | int
) -> None:
    """Launches with those of the constants that the kernel takes, its own, and its block of columns."""
    constants = _own_constants(kernel, len(arguments), tile[0], common, tuple(more.items()))
    launch(kernel, grid, arguments, constants, *tile[1:])


@functools.cache
def _own_constants(
    kernel: Any, first: int, columns: int, common: Constants, more: tuple[tuple[str, int], ...]
) -> Constants:
    values = {**common, **dict(more), "BV": min(columns, common["V_PADDED"])}
    return Constants({name: values[name] for name in kernel.arg_names[first:]})
