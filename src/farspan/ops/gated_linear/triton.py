"""Gated linear attention through Triton kernels: tables of work, launches, and the gradient around them.

The same launches serve MetaLA, whose gate, augmentation and normalisation run inside the kernels (`Options`).
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import plain_backward
from farspan.ops.gated_linear import chunk_kernels, extreme_kernels, kernels

CHUNK = 64
# Half of the range of the log decay in a chunk up to which one factorisation serves; exp of it must fit the dtype.
LIMIT = {torch.float16: 8.0, torch.bfloat16: 60.0, torch.float32: 60.0}
DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Programs of the state kernels that keep the card busy: one for each of 132 multiprocessors.
PROGRAMS = 132
# Fewest and most chunks of a segment.
SEGMENT = (4, 64)
# Warp-group matrix instructions fail on blocks of 32 columns.
NARROWEST = 64
INTERPRETED = not isinstance(kernels.state_kernel, triton.runtime.JITFunction)


class Tiles(NamedTuple):
    """Sizes of the kernels' blocks: columns of V at once, warps and stages."""

    state: tuple[int, int, int] = (64, 4, 3)
    output: tuple[int, int, int] = (128, 4, 1)
    value_gradient: tuple[int, int, int] = (64, 4, 1)
    gradient: tuple[int, int, int] = (64, 4, 3)


# (architecture family, padded K up to, bytes of an operand) -> tiles. The nearest older family serves an unlisted one.
TILES = {
    (8, 64, 2): Tiles(),
    (8, 128, 2): Tiles((64, 4, 2), (64, 8, 1), (64, 8, 1), (64, 8, 1)),
    (8, 128, 4): Tiles((64, 4, 1), (64, 8, 1), (64, 8, 1), (64, 8, 1)),
    (9, 64, 2): Tiles(),
    (9, 128, 2): Tiles((64, 4, 2), (64, 8, 1), (64, 8, 1), (64, 8, 1)),
    (9, 128, 4): Tiles((64, 4, 1), (64, 8, 1), (64, 8, 1), (64, 8, 1)),
}


def tiles(family: int, width: int, size: int) -> Tiles:
    """The entry of the table for an architecture family, a padded K and the bytes of an operand."""
    known = max(entry[0] for entry in TILES if entry[0] <= family)
    fitting = (entry for entry in sorted(TILES) if entry[0] == known and width <= entry[1] and size <= entry[2])
    return TILES[next(fitting)]


@dataclass(frozen=True)
class Options:
    """What the kernels compute beside the recurrence.

    Attributes:
        scale: factor of the recurrent term.
        decay: 0 none, 1 per head, 2 per channel, 3 gate logits that give both decay and key.
        normalizer: tau of the gate logits.
        augment: whether a weight for the self-augmentation is given.
        inside: whether the augmentation's sigmoid encloses the product with v.
        normalize: whether every head is normalised over V.
        eps: epsilon of the normalisation.
    """

    scale: float
    decay: int
    normalizer: float = 1.0
    augment: bool = False
    inside: bool = True
    normalize: bool = False
    eps: float = 1e-5


class Plan(NamedTuple):
    """Where segments and chunks lie among the tokens, as int32 tables on the device.

    Attributes:
        segments: `[num_segments, 3]`: first token, end of its tokens, first chunk.
        offsets: `[num_seqs + 1]`: the first segment of every sequence.
        chunks: `[num_chunks, 2]`: first token, end of its sequence.
    """

    segments: Tensor
    offsets: Tensor
    chunks: Tensor

    @property
    def whole(self) -> bool:
        """Whether every sequence is one segment."""
        return self.segments.shape[0] == self.offsets.shape[0] - 1


def gated_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernels' form of `gated_linear_attention`; arguments and results as the reference's."""
    decay = 0 if log_decay is None else log_decay.dim() - 2
    return attend(q, k, v, log_decay, None, initial_state, cu_seqlens, Options(float(scale), decay))


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Plans the work and runs it.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`, or None when the gate gives it.
        v: `[B, T, H, V]`.
        gate: log decay `[B, T, H]` or `[B, T, H, K]`, gate logits `[B, T, H, K]`, or None.
        weight: `[H, K]` of the augmentation, or None.
        initial: `[B or num_seqs, H, K, V]`, or None for zeros.
        cu_seqlens: `[num_seqs + 1]` int32, or None.
        options: what to compute.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state in float32.
    """
    batch, length, heads, width = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial is None:
        initial = q.new_zeros(sequences, heads, width, v.shape[-1], dtype=torch.float32)
    if v.numel() == 0:
        return torch.zeros_like(v), initial.float()
    columns = triton.cdiv(v.shape[-1], _tiles(q).state[0])
    work = batch * length * heads * columns // (CHUNK * PROGRAMS)
    segment = CHUNK * min(max(1 << work.bit_length() >> 1, SEGMENT[0]), SEGMENT[1])
    if cu_seqlens is None:
        plan = _dense_plan(batch, length, segment, q.device)
    else:
        spans = varlen.spans(cu_seqlens)
        plan = varlen.remember(cu_seqlens, ("plan", segment), lambda: _plan(spans, segment, q.device))
    with torch.cuda.device_of(q):
        tensors = (None if x is None else x.contiguous() for x in (q, k, v, gate, weight, initial.float()))
        out, final = _Attention.apply(*tensors, plan, options)
    return out, final


@functools.lru_cache(maxsize=64)
def _dense_plan(batch: int, length: int, segment: int, device: torch.device) -> Plan:
    return _plan([(row * length, (row + 1) * length) for row in range(batch)], segment, device)


def _plan(spans: list[tuple[int, int]], segment: int, device: torch.device) -> Plan:
    segments: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    offsets = [0]
    for start, end in spans:
        for first in range(start, max(end, start + 1), segment):
            last = min(first + segment, end)
            segments.append((first, last, len(chunks)))
            chunks += [(token, end) for token in range(first, last, CHUNK)]
        offsets.append(len(segments))
    tables = (torch.tensor(table, dtype=torch.int32) for table in (segments, offsets, chunks))
    return Plan(*(table.to(device, non_blocking=True) for table in tables))


class _Prepared(NamedTuple):
    """What `prepare_kernel` gives: queries and keys with their decays, centre and half range of chunks, MetaLA's u."""

    q: Tensor
    k: Tensor
    centre: Tensor
    half: Tensor
    u: Tensor


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        initial: Tensor,
        plan: Plan,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        prepared = _prepare(q, k, v, gate, weight, plan, options)
        states, final = _states(prepared.k, v, prepared, initial, plan, options, reverse=False)
        out = torch.empty_like(v)
        rstd = v.new_empty(v.shape[:3] if options.normalize else (0,), dtype=torch.float32)
        columns, warps, stages = _tiles(prepared.q).output
        columns = (
            max(NARROWEST, triton.next_power_of_2(v.shape[-1])) if options.augment or options.normalize else columns
        )
        shape = _shape(q, v, columns)
        grid = (plan.chunks.shape[0], shape["H"], triton.cdiv(shape["V"], shape["BV"]))
        numbers, form = _numbers(prepared.q, options), {"AUGMENT": options.augment, "INSIDE": options.inside}
        chunk_kernels.output_kernel[grid](
            prepared.q, prepared.k, v, prepared.half, prepared.u, states, out, rstd, plan.chunks, options.eps,
            **shape, **numbers, **form, NORMALIZE=options.normalize, FAST=_fast(q), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if gate is not None:
            extreme_kernels.extreme_output_kernel[(_many(plan), *grid[1:])](
                q, q if k is None else k, prepared.q, v, gate, prepared.half, prepared.u, states, out, rstd,
                plan.chunks, plan.chunks.shape[0], options.scale, options.normalizer, options.eps, **shape, **numbers,
                **form, NORMALIZE=options.normalize, FAST=_fast(q), LEVELS=_levels(), num_warps=warps, num_stages=1,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, gate, weight, *prepared, states, out if options.normalize else None, rstd)
        ctx.plan, ctx.options = plan, options
        return out, final

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate, weight, *rest, states, out, rstd = ctx.saved_tensors
        prepared, plan, options = _Prepared(*rest), ctx.plan, ctx.options
        with torch.cuda.device_of(q):
            d_out, d_final = gradients[0].contiguous(), gradients[1].contiguous()
            if options.normalize:
                d_out = _norm_gradient(d_out, out, rstd)
            d_states, d_initial = _states(prepared.q, d_out, prepared, d_final, plan, options, reverse=True)
            dq, dv = torch.empty_like(q), torch.empty_like(v)
            dk = None if k is None else torch.empty_like(k)
            d_gate = None if gate is None else torch.empty_like(gate)
            d_weight = None
            if weight is not None:
                d_weight = weight.new_empty(plan.chunks.shape[0], *weight.shape, dtype=torch.float32)
            du = torch.empty_like(prepared.u)
            numbers, grid = _numbers(prepared.q, options), (plan.chunks.shape[0], q.shape[2])
            columns, warps, stages = _tiles(prepared.q).value_gradient
            chunk_kernels.value_gradient_kernel[grid](
                prepared.q, prepared.k, v, prepared.half, prepared.u, d_out, d_states, dv, du, plan.chunks,
                **_shape(q, v, columns), **numbers, AUGMENT=options.augment, INSIDE=options.inside, FAST=_fast(q),
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            columns, warps, stages = _tiles(prepared.q).gradient
            shape, own_k, own_weight = _shape(q, v, columns), q if k is None else k, q if weight is None else weight
            d_key, d_own_weight = dq if dk is None else dk, dq if d_weight is None else d_weight
            chunk_kernels.gradient_kernel[grid](
                own_k, prepared.q, prepared.k, v, q if gate is None else gate, prepared.half, own_weight, d_out,
                states, d_states, dq, d_key, dq if d_gate is None else d_gate, du, d_own_weight, plan.chunks,
                options.scale, options.normalizer, **shape, **numbers, **_sums(q), AUGMENT=options.augment,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            if gate is not None:
                extreme_kernels.extreme_gradient_kernel[(_many(plan), grid[1])](
                    q, own_k, prepared.q, prepared.k, v, gate, prepared.half, prepared.u, own_weight, d_out, states,
                    d_states, dq, d_key, dv, d_gate, d_own_weight, plan.chunks, plan.chunks.shape[0], options.scale,
                    options.normalizer,
                    **shape, **numbers, **_sums(q), AUGMENT=options.augment, INSIDE=options.inside, LEVELS=_levels(),
                    num_warps=8, num_stages=1,
                )  # fmt: skip
        if weight is not None and d_weight is not None:
            # One number per chunk and channel, summed as a product with ones, which is faster than `sum` here.
            d_weight = d_weight.new_ones(d_weight.shape[0]) @ d_weight.flatten(1)
            d_weight = d_weight.view_as(weight).to(weight.dtype)
        return dq, dk, dv, d_gate, d_weight, d_initial, None, None


def _prepare(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    plan: Plan,
    options: Options,
) -> _Prepared:
    """Queries and keys in the dtype of the matrix products, which is q's."""
    chunks, heads, width = plan.chunks.shape[0], *q.shape[2:]
    vector = (chunks if gate is not None else 0, heads, width)
    prepared = _Prepared(
        torch.empty_like(q),
        torch.empty_like(q),
        q.new_empty(vector, dtype=torch.float32),
        q.new_empty(vector, dtype=torch.float32),
        q.new_empty(q.shape[:3] if options.augment else (0,), dtype=torch.float32),
    )
    kernels.prepare_kernel[(chunks, heads)](
        q, q if k is None else k, q if gate is None else gate, q if weight is None else weight, *prepared, plan.chunks,
        options.scale, options.normalizer, **_shape(q, v, NARROWEST), DECAY=options.decay, LIMIT=LIMIT[q.dtype],
        AUGMENT=options.augment, **_sums(q), num_warps=4,
    )  # fmt: skip
    if gate is not None:
        extreme_kernels.extreme_prepare_kernel[(_many(plan), heads)](
            q, q if k is None else k, gate, prepared.q, prepared.k, prepared.half, plan.chunks, chunks, options.scale,
            options.normalizer, **_shape(q, v, NARROWEST), DECAY=options.decay, LIMIT=LIMIT[q.dtype], num_warps=4,
        )  # fmt: skip
    return prepared


def _states(
    x: Tensor,
    y: Tensor,
    prepared: _Prepared,
    start: Tensor,
    plan: Plan,
    options: Options,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The state in front of every chunk and after every sequence; in reverse, their gradients."""
    columns, warps, stages = _tiles(x).state
    shape = _shape(x, y, columns)
    heads, size = shape["H"], start.shape[-2:]
    count = plan.segments.shape[0]
    grid = (count, heads, triton.cdiv(shape["V"], shape["BV"]))
    states = x.new_empty(plan.chunks.shape[0], heads, *size)
    final = torch.empty_like(start)

    def walk(start: Tensor, end: Tensor, lost: Tensor, **stores: bool) -> None:
        kernels.state_kernel[grid](
            x, y, prepared.centre, prepared.half, start, end, lost, states, plan.segments, **shape,
            **_numbers(x, options), **stores, REVERSE=reverse, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    if plan.whole:
        walk(start, final, start, HAS_START=True, STORE_STATES=True, STORE_END=True, STORE_LOST=False)
        return states, final
    added, lost = start.new_empty(count, heads, *size), start.new_empty(count, heads, size[0])
    walk(start, added, lost, HAS_START=False, STORE_STATES=False, STORE_END=True, STORE_LOST=True)
    entering, block = torch.empty_like(added), 256
    sequences = plan.offsets.shape[0] - 1
    kernels.scan_kernel[(sequences, heads, triton.cdiv(size.numel(), block))](
        added, lost, start, entering, final, plan.offsets,
        H=heads, K=size[0], V=size[1], BN=block, REVERSE=reverse, num_warps=2,
    )  # fmt: skip
    walk(entering, final, lost, HAS_START=True, STORE_STATES=True, STORE_END=False, STORE_LOST=False)
    return states, final


def _norm_gradient(dy: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    d_out, rows, width = torch.empty_like(y), rstd.numel(), y.shape[-1]
    block = triton.next_power_of_2(width)
    height = max(1, 4096 // block)
    chunk_kernels.norm_kernel[(triton.cdiv(rows, height),)](
        dy, y, rstd, d_out, rows, V=width, BR=height, BV=block, num_warps=4
    )
    return d_out


def _tiles(q: Tensor) -> Tiles:
    family = 9 if INTERPRETED else torch.cuda.get_device_capability(q.device)[0]
    return tiles(family, max(16, triton.next_power_of_2(q.shape[-1])), q.element_size())


def _many(plan: Plan) -> int:
    return triton.cdiv(plan.chunks.shape[0], extreme_kernels.MANY.value)


def _levels() -> int:
    return CHUNK.bit_length() - 1


def _shape(q: Tensor, v: Tensor, columns: int) -> dict[str, int]:
    heads, width, values = q.shape[2], q.shape[3], v.shape[3]
    return {
        "H": heads, "K": width, "V": values, "BT": CHUNK, "BK": max(NARROWEST, triton.next_power_of_2(width)),
        "BV": min(columns, max(NARROWEST, triton.next_power_of_2(values))),
    }  # fmt: skip


def _numbers(q: Tensor, options: Options) -> dict[str, Any]:
    """Decay and matrix products. The interpreter has no 16-bit arithmetic that could be trusted: it takes float32."""
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    dot = tl.float32 if INTERPRETED else DOT[q.dtype]
    return {"DECAY": options.decay, "LIMIT": LIMIT[q.dtype], "DOT": dot, "PRECISION": precision}


def _sums(q: Tensor) -> dict[str, Any]:
    return {"FAST": _fast(q), "PART": tl.float32 if INTERPRETED else tl.bfloat16}


def _fast(q: Tensor) -> int:
    """How much precision the kernels may give up: none, far less than 16 bits hold, or that by hardware functions."""
    return 0 if q.dtype == torch.float32 else 1 if INTERPRETED else 2
