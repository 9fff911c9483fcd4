"""Dilated attention on a GPU where cuDNN cannot serve: biases, packed documents, float32, other head sizes.

The patterns follow each other, each read in place by kernels whose programs take a block of rows of one segment and
head. Sums over patterns are formed in float32; backward needs q, k, v, the output and one number per row and head.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farspan.ops import varlen
from farspan.ops._contract import plain_backward
from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.dilated import rows_kernels as kernels
from farspan.ops.dilated.patterns import DilatedSettings, ceil_div, head_offsets

# Programs that share the gradient of a bias.
PROGRAMS = 1024


class Blocks(NamedTuple):
    """Rows of a program and of what it reads at a time and its warps, forward; rows, rows for a bias, warps backward.

    Loops are pipelined in so many stages.
    """

    forward: int
    read: int
    forward_warps: int
    backward: int
    bias: int
    backward_warps: int
    stages: int


def blocks(dtype: torch.dtype, width: int) -> Blocks:
    """The largest that stay in registers."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 32, 32, 4, 1)
    return Blocks(128, 64, 8, 64, 64, 4, 2) if width <= 64 else Blocks(128, 32, 8, 64, 32, 8, 2)


class _Tiles(NamedTuple):
    """Blocks of the rows of all segments, `[blocks, 3]`: start of the segment, its width, index of the block.

    Those with the longest way to go come first. `reach` is the largest number of rows of a segment.
    """

    table: Tensor
    reach: int


@functools.lru_cache(maxsize=256)
def _tiles(bounds: tuple[int, ...], segment: int, dilation: int, block: int, device: torch.device) -> _Tiles:
    starts, widths = _segments(bounds, segment)
    rows = (widths + dilation - 1) // dilation
    blocks = (rows + block - 1) // block
    index = _counted(blocks)
    table = torch.stack((starts.repeat_interleave(blocks), widths.repeat_interleave(blocks), index), dim=1)
    return _Tiles(table[index.argsort(descending=True, stable=True)].to(device), int(rows.max()))


def _segments(bounds: tuple[int, ...], segment: int) -> tuple[Tensor, Tensor]:
    """Starts and widths of the segments of sequences that start and end at these places in turn."""
    starts, ends = torch.tensor(bounds).view(-1, 2).unbind(1)
    counts = (ends - starts + segment - 1) // segment
    starts, ends = (x.repeat_interleave(counts) for x in (starts, ends))
    starts = starts + _counted(counts) * segment
    return starts, (ends - starts).clamp(max=segment)


def _counted(counts: Tensor) -> Tensor:
    """0, 1, … for each of these counts, one after another."""
    ends = counts.cumsum(0)
    return torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)


@functools.lru_cache(maxsize=256)
def _offsets(rule: str, heads: int, dilation: int, device: torch.device) -> Tensor:
    return torch.tensor(head_offsets(rule, heads, dilation)).to(device)


@functools.cache
def _constants(
    key_width: int,
    value_width: int,
    causal: bool,
    block: int,
    other: int | None,
    bias: bool | None,
    wide: bool,
    exact: bool | None,
) -> Constants:
    """Compile-time arguments; warp-group instructions fault below 64 channels."""
    widths = {"BK": max(64, 1 << (key_width - 1).bit_length()), "BV": max(64, 1 << (value_width - 1).bit_length())}
    blocks = {"BM": block} if other is None else {"BM": block, "BN": other}
    options: dict[str, bool | str] = {"CAUSAL": causal} if bias is None else {"CAUSAL": causal, "BIAS": bias}
    options["PRECISION"] = "tf32x3" if wide else "ieee"
    if exact is not None:
        options["EXACT"] = exact and not wide
    return Constants(K=key_width, V=value_width, **widths, **blocks, **options)


def _bounds(tokens: int, batch: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Where sequences start and end in turn, rows of the batch laid end to end; empty ones left out."""
    ends = range(0, tokens + 1, tokens // batch) if cu_seqlens is None else varlen.boundaries(cu_seqlens)
    return tuple(place for span in itertools.pairwise(ends) if span[0] < span[1] for place in span)


class _Pattern(NamedTuple):
    """One pattern of a call: what it reads, and how its kernels are started."""

    call: "_Call"
    q: Tensor
    k: Tensor
    v: Tensor
    segment: int
    dilation: int
    reach: int
    line: Tensor | None

    def start(
        self, kernel: Any, tensors: Sequence[Tensor], rows: int, others: int, warps: int, exact: bool | None = None
    ) -> None:
        """Starts a kernel of blocks of so many rows against so many others."""
        call = self.call
        table = call.tiles(self.segment, self.dilation, rows).table
        arguments = (*tensors, table, *self._numbers())
        constants = call.constants(rows, others, self.line is not None, exact)
        launch(kernel, (len(table), call.heads), arguments, constants, warps, call.blocks.stages)

    def _numbers(self) -> tuple[Any, ...]:
        call, heads = self.call, self.call.heads
        offsets = _offsets(call.rule, heads, self.dilation, self.q.device)
        return offsets, len(self.q), self.dilation, self.reach, heads, call.scale

    def attend(self, out: Tensor, total: Tensor, exact: bool) -> None:
        """Takes the pattern into a running mixture, in place."""
        line, sizes = total if self.line is None else self.line, self.call.blocks
        tensors = (self.q, self.k, self.v, line, out, total)
        self.start(kernels.attend_kernel, tensors, sizes.forward, sizes.read, sizes.forward_warps, exact)

    def differentiate(
        self, grad: Tensor, out: Tensor, total: Tensor, gradients: Sequence[Tensor], d_bias: Tensor | None
    ) -> None:
        """Adds the pattern's share to the gradients of q, k, v and of the bias, in place."""
        q, k, v, delta = self.q, self.k, self.v, torch.empty_like(total)
        line = total if self.line is None else self.line
        dq, dk, dv = gradients
        block, warps = self.call.blocks.backward, self.call.blocks.backward_warps
        for_queries = (grad, q, k, v, out, line, total, delta, dq)
        self.start(kernels.query_gradient_kernel, for_queries, block, block, warps)
        self.start(kernels.key_gradient_kernel, (grad, q, k, v, line, total, delta, dk, dv), block, block, warps)
        if d_bias is not None:
            self._bias_gradient(grad, total, delta, d_bias)

    def _bias_gradient(self, grad: Tensor, total: Tensor, delta: Tensor, d_bias: Tensor) -> None:
        assert self.line is not None
        call, block, heads = self.call, self.call.blocks.bias, self.call.heads
        table = call.tiles(self.segment, self.dilation, block).table
        far = ceil_div(self.reach, block)
        distances = far if call.causal else 2 * far - 1
        parts = max(1, min(len(table), PROGRAMS // (heads * distances)))
        sums = torch.empty(heads, distances, parts, block, block, dtype=torch.float32, device=grad.device)
        tensors = (grad, self.q, self.k, self.v, self.line, total, delta, sums, table)
        offsets, *numbers = self._numbers()
        arguments = (*tensors, offsets, len(table), 1 - far, *numbers)
        constants = call.constants(block, None, None)
        launch(kernels.bias_gradient_kernel, (parts, heads, distances), arguments, constants, 4 * block // 32)
        along = _diagonals(sums.sum(2))[:, far * block - self.reach :][:, : 2 * self.reach - 1]
        self._of_line(d_bias)[:, : along.shape[1]].add_(along)

    def _of_line(self, bias: Tensor) -> Tensor:
        """The entries of `[H, 2M − 1]` that rows of the pattern are apart, a view `[H, 2c − 1]`."""
        centre, far = bias.shape[1] // 2, (self.reach - 1) * self.dilation
        return bias[:, centre - far : centre + far + 1 : self.dilation]


def _diagonals(blocks: Tensor) -> Tensor:
    """Sums along the diagonals of `[H, d, B, B]`, `[H, (d + 1)·B]`; axis 1 are blocks beside each other."""
    heads, count, size, _ = blocks.shape
    room = blocks.new_zeros(heads, count, size, 2 * size)
    room[..., :size] = blocks.flip(2)
    # Rows of 2B − 1 numbers shift by one from each to the next.
    lines = room.flatten(2)[..., : size * (2 * size - 1)].unflatten(2, (size, 2 * size - 1)).sum(2)
    found = blocks.new_zeros(heads, count + 1, size)
    found[:, :-1] += lines[..., :size]
    found[:, 1:, :-1] += lines[..., size:]
    return found.flatten(1)


class _Call(NamedTuple):
    """One call over all rows, laid end to end."""

    settings: DilatedSettings
    bounds: tuple[int, ...]
    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, q: Tensor, v: Tensor, bias: Tensor | None, *arguments: Any) -> "_Call":
        cu_seqlens, batch, segments, dilations, rule, causal, scale = arguments
        patterns = tuple(zip(segments, dilations, strict=True))
        settings = DilatedSettings(patterns, rule, causal, scale, distance_bias=bias)
        return cls(settings, _bounds(len(q), batch, cu_seqlens), q.shape[1], q.shape[2], v.shape[2], q.dtype, q.device)

    @property
    def rule(self) -> str:
        return self.settings.head_offset

    @property
    def causal(self) -> bool:
        return self.settings.causal

    @property
    def scale(self) -> float:
        return self.settings.scale

    @property
    def blocks(self) -> Blocks:
        return blocks(self.dtype, max(self.key_width, self.value_width))

    def tiles(self, segment: int, dilation: int, block: int) -> _Tiles:
        return _tiles(self.bounds, segment, dilation, block, self.device)

    def constants(self, block: int, other: int | None, bias: bool | None, exact: bool | None = None) -> Constants:
        wide = self.dtype == torch.float32
        return _constants(self.key_width, self.value_width, self.causal, block, other, bias, wide, exact)

    def patterns(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Pattern]:
        """The patterns one by one."""
        bias = self.settings.distance_bias
        for segment, dilation in self.settings.patterns:
            tiles = self.tiles(segment, dilation, self.blocks.backward)
            pattern = _Pattern(self, q, k, v, segment, dilation, tiles.reach, None)
            yield pattern if bias is None else pattern._replace(line=pattern._of_line(bias).contiguous())

    def sums(self, *like: Tensor, exact: bool = False) -> tuple[Tensor, ...]:
        """Zeros in which patterns are added up: in float32, unless there is a single one."""
        several = exact or len(self.settings.patterns) > 1
        return tuple(torch.zeros_like(x, dtype=torch.float32 if several else x.dtype) for x in like)

    def empty_total(self, q: Tensor) -> Tensor:
        return torch.full((self.heads, len(q)), float("-inf"), dtype=torch.float32, device=q.device)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        options: Any,
        detach: bool,
    ) -> Tensor:
        learnt = ctx.needs_input_grad[3]
        out, exact, total = forward_node(q, k, v, bias, cu_seqlens, *options, learnt)
        ctx.save_for_backward(q, k, v, exact if learnt else out, total, bias, cu_seqlens)
        ctx.options, ctx.detach = options, detach
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, learnt = ctx.saved_tensors, ctx.needs_input_grad[3]
        *gradients, d_bias = backward_node(grad.contiguous(), *saved, *ctx.options, ctx.detach, learnt)
        return (*gradients, d_bias.to(saved[-2].dtype) if learnt else None, None, None, None)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, cu_seqlens: Tensor | None) -> Tensor:
    """Dilated attention of contiguous q, k, v with equally many heads and one dtype."""
    segments, dilations = (list(numbers) for numbers in zip(*settings.patterns, strict=True))
    options = (len(q), segments, dilations, settings.head_offset, settings.causal, float(settings.scale))
    flat, bias, detach = [x.flatten(0, 1) for x in (q, k, v)], settings.distance_bias, settings.detach_mixture_weights
    if not torch.compiler.is_compiling():
        learnt = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        trains = learnt or (torch.is_grad_enabled() and any(x.requires_grad for x in flat))
        forms = len(segments) > 1, settings.causal, detach, trains, learnt
        key = q.device, q.dtype, q.shape[3], v.shape[3], None if bias is None else bias.dtype
        compile_ahead(("dilated rows", *forms, *key), functools.partial(_rehearse, flat, bias, *forms))
    out: Tensor = _Rows.apply(*flat, bias, cu_seqlens, options, detach)
    return out.unflatten(0, q.shape[:2])


def _rehearse(
    flat: Sequence[Tensor], bias: Tensor | None, several: bool, causal: bool, detach: bool, trains: bool, learnt: bool
) -> None:
    """Every launch of a call and of its gradient, on little."""
    length = 64
    q, k, v = (x.new_zeros(length, *x.shape[1:]) for x in flat)
    bias = None if bias is None else bias.new_zeros(len(bias), 2 * length - 1)
    patterns = 2 if several else 1
    options = None, 1, [length] * patterns, [1] * patterns, "none", causal, 1.0
    out, exact, total = _forward(q, k, v, bias, *options, learnt)
    if trains:
        _backward(out, q, k, v, exact if learnt else out, total, bias, *options, detach, learnt)


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the same in float32 where a bias is learnt (its gradient is a sum of small differences), totals."""
    (*options, learnt) = options  # type: ignore[assignment]
    call = _Call.of(q, v, bias, *options)
    total, (sums,) = call.empty_total(q), call.sums(v, exact=learnt)
    with torch.cuda.device_of(q):
        for pattern in call.patterns(q, k, v):
            pattern.attend(sums, total, learnt)
    out = sums.to(v.dtype, copy=learnt)
    return out, sums if learnt else total.new_empty(0), total


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (*options, detach, learnt) = options  # type: ignore[assignment]
    call, shared = _Call.of(q, v, bias, *options), (grad, out, total)
    gradients = call.sums(q, k, v)
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if learnt and bias is not None else None
    with torch.cuda.device_of(q):
        for pattern in call.patterns(q, k, v):
            pattern.differentiate(*(_alone(pattern, *shared, learnt) if detach else shared), gradients, d_bias)
    dq, dk, dv = (x.to(q.dtype) for x in gradients)
    return dq, dk, dv, total.new_empty(0) if d_bias is None else d_bias


def _alone(pattern: _Pattern, grad: Tensor, out: Tensor, total: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a pattern by itself gives, with its constant share of the gradient."""
    own, (result,) = pattern.call.empty_total(out), pattern.call.sums(out)
    pattern.attend(result, own, exact)
    share = (own - total).exp().nan_to_num().mT.unsqueeze(-1)
    return (share * grad).to(grad.dtype).contiguous(), result, own


def _shapes(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.empty_like(v, dtype=torch.float32) if others[-1] else q.new_empty(0, dtype=torch.float32)
    return torch.empty_like(v), exact, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _gradient_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    learnt = others[-1] and bias is not None
    d_bias = torch.empty_like(bias, dtype=torch.float32) if learnt else total.new_empty(0)  # type: ignore[arg-type]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias


_OPTIONS = (
    "Tensor? bias, Tensor? cu_seqlens, SymInt batch, int[] segments, int[] dilations, str rule, bool causal, "
    "float scale"
)
forward_node = register_node(
    f"dilated_rows(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool learnt) -> (Tensor out, Tensor exact, Tensor total)",
    _forward,
    _shapes,
)
backward_node = register_node(
    f"dilated_rows_gradient(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor total, {_OPTIONS}, "
    "bool detach, bool learnt) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_bias)",
    _backward,
    _gradient_shapes,
)
