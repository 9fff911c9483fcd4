"""Dilated attention on a GPU: cuDNN on strided views, one call a box, and Triton kernels that join the boxes.

What cuDNN does not take (biases, packed documents, other dtypes and head sizes) goes to `rows`.

The mixture is one softmax over all keys, so the gradient of each box follows from the merged output and the global
log-sum-exp alone: q, k, v, the output and one number per row and head are all that is kept. Nothing is gathered; boxes
are joined stretch by stretch, which bounds what they take in between.

What cuDNN gives is rounded to 16 bits, box by box, and it takes the output rounded too. That shows where the weights
are large, in causal rows with few keys: rows at the beginnings of segments get their gradients apart, in float32.
"""

import functools
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import plain_backward, without_autocast
from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.dilated import cudnn, kernels
from farspan.ops.dilated.boxes import NUMBERS, WORD, Box, boxes, runs, stretches, table
from farspan.ops.dilated.limits import cudnn_serves
from farspan.ops.dilated.patterns import DilatedSettings, head_offsets, sequences
from farspan.ops.dilated.rotation import turn_factors, turn_pair
from farspan.ops.dilated.rows import attend_rows
from farspan.ops.dilated.streams import release, side_by_side

# Numbers of one tensor whose boxes are held at once, forward and backward, and segments times heads of one call.
FORWARD, BACKWARD, CALL = 3 << 28, 9 << 23, 1 << 15
# Streams for boxes that do not fill a device one by one, and numbers from which they do, forward.
LANES, FULL = 4, 1 << 28
BLOCK = 64
# Tokens from the beginning of a segment that may have few keys: in 200 draws of LongNet's ratios the largest error of a
# gradient over that of a float32 softmax with 16-bit operands is up to 1.7 with 32, up to 1.8 with 16, and 2.8 without.
FEW = 32


def dilated_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, cu_seqlens: Tensor | None = None
) -> Tensor:
    """See `dilated_attention`; serves what the limits let pass."""
    if q.numel() == 0 or v.numel() == 0:
        return v.new_zeros((*q.shape[:3], v.shape[3]))
    group, kept = q.shape[2] // k.shape[2], v.dtype
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    with without_autocast(q):
        q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
        window = settings.window(sequences(cu_seqlens, q.shape[1]))
        if settings.frequencies is not None and settings.growth is not None and window is not None:
            places = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
            if cu_seqlens is not None:
                places = varlen.position_ids(cu_seqlens, q.shape[1]).view(q.shape[:2])
            q, k = turn_pair(q, k, *turn_factors(places, window, settings.frequencies, settings.growth))
        k, v = (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k, v))
        if cudnn_serves(q, v, settings, cu_seqlens):
            out: Tensor = _Boxes.apply(q, k, v, settings)
        else:
            out = attend_rows(q, k, v, settings, cu_seqlens)
        return out.to(kept)


class _Boxes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings) -> Tensor:
        out, lse = forward_node(q, k, v, *_arguments(settings))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        detach = ctx.settings.detach_mixture_weights
        gradients = backward_node(grad.contiguous(), *ctx.saved_tensors, *_arguments(ctx.settings), detach)
        return (*gradients, None)


def _arguments(settings: DilatedSettings) -> tuple[Any, ...]:
    """The settings as arguments of a node."""
    segments, dilations = (list(numbers) for numbers in zip(*settings.patterns, strict=True))
    return segments, dilations, settings.head_offset, settings.causal, float(settings.scale)


class _Call(NamedTuple):
    """One call: its settings, with segments no longer than a sequence, and the sizes of its tensors."""

    settings: DilatedSettings
    batch: int
    length: int
    heads: int
    width: int

    @classmethod
    def of(cls, q: Tensor, *arguments: Any) -> "_Call":
        segments, dilations, rule, causal, scale = arguments
        patterns = tuple((min(w, q.shape[1]), r) for w, r in zip(segments, dilations, strict=True))
        return cls(DilatedSettings(patterns, rule, causal=causal, scale=scale), *q.shape)

    def base(self) -> Box | None:
        """A pattern that takes every row of every head in one call: the others are added to what it gives."""
        tokens = self.batch * self.length
        for segment, dilation in self.settings.patterns if len(self.settings.patterns) > 1 else ():
            if dilation == 1 and self.length % segment == 0 and tokens // segment * self.heads <= CALL:
                (box,) = boxes([(segment, 1)], "none", self.heads, 0, tokens)
                return box
        return None

    def stretches(self, numbers: int, base: Box | None) -> list[tuple[int, int, list[Box]]]:
        """Stretches of tokens, of so many numbers each, and their boxes without the base."""
        patterns = list(self.settings.patterns)
        tokens = min(numbers // (self.heads * self.width), CALL // self.heads * min(w for w, _ in patterns))
        if base is not None:
            patterns.remove((base.width, 1))
        found = []
        for run in runs(self.settings.patterns, self.batch, self.length):
            for start, stop in stretches(patterns, *run, tokens):
                found.append((start, stop, list(boxes(patterns, self.settings.head_offset, self.heads, start, stop))))
        return found

    def few(self) -> tuple[int, int]:
        """Tokens between beginnings of the shortest segments, and how many of them may have few keys."""
        width = min(segment for segment, _ in self.settings.patterns)
        return width, min(FEW, max(16, triton.next_power_of_2(width)))

    def grid(self, start: int, stop: int) -> tuple[int, int]:
        return triton.cdiv(stop - start, BLOCK), self.heads


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call, shape = _Call.of(q, *arguments), q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    base = call.base()
    lse = torch.empty(call.heads, len(q), dtype=torch.float32, device=q.device)
    out, base_lse = (torch.empty_like(q) if base is None else q), lse  # what the base gives is written to
    with torch.cuda.device_of(q):
        key = "dilated boxes", q.device, q.dtype, *q.shape[1:], *call.settings.patterns, call.settings.head_offset
        key = *key, call.settings.causal
        compile_ahead(key, partial(_rehearse, call, base, q, lse))
        for start, stop, some in call.stretches(FORWARD, base):
            first = [base] if base is not None and start == 0 else []
            lanes = 1 if (stop - start) * call.heads * call.width > FULL else LANES
            parts = side_by_side([partial(_attend, call, box, q, k, v) for box in first + some], q.device, lanes)
            if first:
                whole, base_lse = parts.pop(0)
                out = _laid(whole).view(q.shape)
            _merge(call, start, stop, some, base, parts, out, lse, base_lse)
            release(q.device, lanes)
            del parts  # before the next stretch makes its own
    return out.view(shape), lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (*options, detach), shape = arguments, q.shape
    call = _Call.of(q, *options)
    grad, q, k, v, out = (x.flatten(0, 1) for x in (grad, q, k, v, out))
    gradients = tuple(torch.empty_like(q) for _ in range(3))
    apart = call.settings.causal and not detach
    total, lse = lse, lse.clone() if apart else lse
    with torch.cuda.device_of(q):
        for start, stop, some in call.stretches(BACKWARD, None):
            firsts = _first_rows(call, start, stop, grad, q, k, v, total, lse) if apart else None
            tensors = (grad, q, k, v, out, lse)
            parts = side_by_side(
                [partial(_attend_backward, call, box, *tensors, detach) for box in some], q.device, LANES
            )
            for index, gradient in enumerate(gradients):
                first = None if firsts is None else firsts[index]
                _sum(call, start, stop, some, [part[index] for part in parts], first, gradient)
            release(q.device, LANES)
            del parts, firsts  # before the next stretch makes its own
    dq, dk, dv = (x.view(shape) for x in gradients)
    return dq, dk, dv


def _merge(
    call: _Call,
    start: int,
    stop: int,
    some: list[Box],
    base: Box | None,
    parts: list[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
    base_lse: Tensor,
) -> None:
    """Joins outputs and log-sum-exps of the boxes of a stretch, the base apart."""
    outs, lses = _filled([_laid(part) for part, _ in parts]), _filled([part_lse.contiguous() for _, part_lse in parts])
    boxes_read = _table(tuple(some), base, call.heads, out.device)
    arguments = outs, lses, boxes_read, out, lse, base_lse, start, stop, lse.shape[1], call.heads
    launch(kernels.merge_kernel, call.grid(start, stop), arguments, _constants(call.width, BASE=base is not None), 4, 3)


def _first_rows(
    call: _Call, start: int, stop: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, lse: Tensor
) -> Tensor:
    """Gradients of q, k and v by rows with few keys, `[3, n, H, c, K]`; `lse` keeps the boxes from giving them."""
    width, rows = call.few()
    windows, settings = triton.cdiv(stop - start, width), call.settings
    found = torch.empty(3, windows, call.heads, rows, call.width, dtype=torch.float32, device=q.device)
    patterns = _offsets(settings.patterns, settings.head_offset, call.heads, q.device)
    numbers = start, stop, lse.shape[1], width, len(settings.patterns), call.heads, settings.scale
    arguments = grad, q, k, v, total, lse, patterns, *found, *numbers
    constants, warps = _first_constants(call.width, rows), 4 if call.width <= 64 else 8
    launch(kernels.first_rows_kernel, (windows, call.heads), arguments, constants, warps)
    return found


def _sum(
    call: _Call,
    start: int,
    stop: int,
    some: list[Box],
    parts: list[Tensor],
    firsts: Tensor | None,
    gradient: Tensor,
) -> None:
    """Adds up what the boxes of a stretch, and its rows with few keys, give to one gradient."""
    boxes_read = _table(tuple(some), None, call.heads, gradient.device)
    width, rows = call.few() if firsts is not None else (1, 0)
    firsts = gradient.new_empty(1, dtype=torch.float32) if firsts is None else firsts
    numbers = start, stop, width, rows, call.heads
    arguments = _filled([_laid(part) for part in parts]), boxes_read, firsts, gradient, *numbers
    launch(kernels.sum_kernel, call.grid(start, stop), arguments, _constants(call.width), 4, 3)


def _rehearse(call: _Call, base: Box | None, q: Tensor, lse: Tensor) -> None:
    """The launches of a call and of its gradient, on little."""
    part, part_lse = q[:1, :, None], lse[:, :1]
    for start, stop, some in call.stretches(FORWARD, base):
        _merge(call, start, stop, some, base, [(part, part_lse)] * len(some), q, lse, lse)
    for start, stop, some in call.stretches(BACKWARD, None):
        if call.settings.causal:
            _first_rows(call, start, min(stop, start + 1), q, q, q, q, lse, lse)
        _sum(call, start, stop, some, [part] * len(some), None, q)


def _attend(call: _Call, box: Box, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output `[n, h, c, K]` and log-sum-exp `[n, h, c]` of a box."""
    return cudnn.attend(box.of(q), box.of(k), box.of(v), call.settings.causal, call.settings.scale)


def _attend_backward(
    call: _Call,
    box: Box,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `[n, h, c, K]` of a box, in the whole softmax or, detached, in its own with a constant share of it."""
    causal, scale = call.settings.causal, call.settings.scale
    rows = box.of(q), box.of(k), box.of(v)
    given, result, total = box.of(grad), box.of(out), box.of_heads(lse).contiguous()
    if detach:
        result, own = cudnn.attend(*rows, causal, scale)
        given, total = (own - total).exp().unsqueeze(-1) * given, own
        given, result = (_like(rows[0], box, call.heads, x) for x in (given, result))
    return cudnn.attend_backward(given, *rows, result, total, causal, scale)


def _like(rows: Tensor, box: Box, heads: int, x: Tensor) -> Tensor:
    """A copy of x, `[n, h, c, K]`, with the strides of the box's rows."""
    if rows.is_contiguous():
        return x.to(rows.dtype).contiguous()
    room = rows.new_empty(box.count * box.width, heads, rows.shape[3])
    return replace(box, start=0).of(room).copy_(x)


def _laid(x: Tensor) -> Tensor:
    """`[n, h, c, K]` as contiguous `[n, c, h, K]`, which is how cuDNN lays out what it computes from strided rows."""
    return x.transpose(1, 2).contiguous()


@functools.cache
def _constants(width: int, **more: bool) -> Constants:
    sizes = {"D": width, "BT": BLOCK, "BD": triton.next_power_of_2(width), "NUMBERS": NUMBERS, "WORD": WORD}
    return Constants(sizes | more)


@functools.cache
def _first_constants(width: int, rows: int) -> Constants:
    return Constants({"D": width, "BD": max(16, triton.next_power_of_2(width)), "ROWS": rows})


@functools.lru_cache(maxsize=256)
def _offsets(patterns: tuple[tuple[int, int], ...], rule: str, heads: int, device: torch.device) -> Tensor:
    """Segment, dilation and the offset of each head, pattern by pattern."""
    found = [[segment, dilation, *head_offsets(rule, heads, dilation)] for segment, dilation in patterns]
    return torch.tensor(found, dtype=torch.int32).to(device)


def _places(count: int) -> int:
    """Boxes that a kernel is compiled for: few different numbers, whatever the lengths are."""
    return max(4, triton.next_power_of_2(count))


def _filled(parts: list[Tensor]) -> tuple[Tensor, ...]:
    """What the boxes gave, and as much again as there are places."""
    return tuple(parts + parts[:1] * (_places(len(parts)) - len(parts)))


@functools.lru_cache(maxsize=256)
def _table(some: tuple[Box, ...], base: Box | None, heads: int, device: torch.device) -> Tensor:
    return torch.tensor(table(some, base, _places(len(some)), heads), dtype=torch.int32).to(device)


def _shapes(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=torch.float32)


def _gradient_shapes(grad: Tensor, q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)


_OPTIONS = "int[] segments, int[] dilations, str rule, bool causal, float scale"
forward_node = register_node(
    f"dilated_boxes(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)", _forward, _shapes
)
backward_node = register_node(
    f"dilated_boxes_gradient(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool detach) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _gradient_shapes,
)
