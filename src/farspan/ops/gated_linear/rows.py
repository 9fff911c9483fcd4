"""Walks of `walk_kernels` over whole sequences: in one go, or in segments that keep the card busy."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from farspan.ops._launch import INTERPRETED, Constants, launch
from farspan.ops._tiles import measured, remembered
from farspan.ops.gated_linear.kernels import scan_kernel
from farspan.ops.gated_linear.plan import Plan
from farspan.ops.gated_linear.tiles import NARROW, NARROWEST, SCAN, chunk_of, family, halved
from farspan.ops.gated_linear.walk_kernels import walk_kernel

WARPS, STAGES = 4, 3
# Numbers of a walk's state, in 16 bits, that so many warps hold; from Hopper on twice as many where k or v is narrow.
# Twice as many warps take wider ones: at a time, in two stages, so many tokens at most, by architecture family.
HELD = 64 * 64
TOKENS = {8: 16, 9: 64}
# What `farspan bench ops --tune` tries.
SCHEDULES = tuple((warps, stages) for warps in (4, 8) for stages in (1, 2, 3, 4))
# Bytes of shared memory that the tiles of all stages of a pipeline may take.
PIPELINE = 100 * 1024
DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Walk(NamedTuple):
    """The tensors of a walk.

    Attributes:
        x: queries, `[B, T, H, X]`.
        y: keys, `[B, T, H, X]`.
        z: values, `[B, T, H, Z]`.
        a: row scale of the result, `[B, T, H]` float32, or None.
        b: row scale of the values, likewise.
        factor: 1 multiplies a by `exp(-sigmoid(exponent) log_count)`, 2 b, 0 neither.
        log_count: `[B, T]` float32, or None.
        exponent: `[H]`, or None.
        own: `[B, T, H, Z]` or None: the result is the gradient of its direction, and is turned into its own.
        own_scale: the inverse norms of `own`, `[B, T, H]`.
        eps: least norm; with `unit`, x and y count by their directions.
        unit: as said.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    factor: int = 0
    log_count: Tensor | None = None
    exponent: Tensor | None = None
    own: Tensor | None = None
    own_scale: Tensor | None = None
    eps: float = 0.0
    unit: bool = False

    def between(
        self,
        plan: Plan,
        start: Tensor | None,
        end: Tensor,
        *,
        reverse: bool = False,
        entering: Tensor | None = None,
    ) -> Tensor | None:
        """The state in front of each segment, `[segments, H, X, Z]`.

        Args:
            plan: where segments and chunks lie.
            start: the state in front of each sequence, `[num_seqs, H, X, Z]`, or None for zeros.
            end: receives the state after each sequence. Where every sequence is one segment, it is left to `run`, and
                `start` is returned.
            reverse: whether to walk from the end.
            entering: room for the result, at least as many segments; None makes its own.
        """
        if plan.whole:
            return start
        heads, width, values = self.z.shape[2], self.x.shape[3], self.z.shape[3]
        shape = (plan.segments.shape[0], heads, width, values)
        added = self.z.new_empty(shape, dtype=torch.float32)
        entering = torch.empty_like(added) if entering is None else entering
        lost, sequences = added.new_empty(shape[:3]), plan.offsets.shape[0] - 1
        self._launch(plan, None, None, added, lost, reverse=reverse)
        launch(
            scan_kernel,
            (sequences, heads, -(-width * values // 256)),
            (added, lost, added if start is None else start, entering, end, plan.offsets, heads),
            _scan_constants(width, values, reverse, start is not None),
            *SCAN[1:],
        )
        return entering

    def run(
        self,
        plan: Plan,
        out: Tensor,
        start: Tensor | None,
        end: Tensor | None = None,
        *,
        turned: bool = False,
        reverse: bool = False,
        parts: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Walks all segments.

        Args:
            plan: where segments and chunks lie.
            out: receives the result, `[B, T, H, Z]`.
            start: the state in front of each segment, from `between`, or None for zeros.
            end: receives the state after each sequence where every sequence is one segment; None where it is not asked
                for.
            turned: whether `start` comes from a walk with x and z in each other's place.
            reverse: whether to walk from the end.
            parts: receives the parts of the exponent's gradient, `[segments, H]` float32.
            scales: receive the inverse norms of x and y.
        """
        end = end if plan.whole else None
        self._launch(plan, out, start, end, None, turned, parts, scales, reverse=reverse)

    def _launch(
        self,
        plan: Plan,
        out: Tensor | None,
        start: Tensor | None,
        end: Tensor | None,
        lost: Tensor | None,
        turned: bool = False,
        parts: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
        *,
        reverse: bool,
    ) -> None:
        constants, warps = _constants(
            self.x.dtype, self.x.shape[3], self.z.shape[3], chunk_of(self.x), family(self.x.get_device()),
            self.unit, self.a is not None, self.b is not None, self.factor, self.own is not None and out is not None,
            reverse, start is not None, turned, out is not None, end is not None, lost is not None, scales is not None,
        )  # fmt: skip
        spare, heads = self.z, self.z.shape[2]
        given = [
            self.x, self.y, self.z, self.a, self.b, self.log_count, self.exponent, self.own, self.own_scale, start, end,
            lost, out, parts, *(scales or (None, None)),
        ]  # fmt: skip
        arguments = [spare if tensor is None else tensor for tensor in given]
        arguments += [plan.segments]
        grid = (plan.segments.shape[0], heads, -(-self.z.shape[3] // constants["BZ"]))
        launch_measured(
            "walk.states" if out is None else "walk.values" if self.own is None else "walk.directions",
            walk_kernel,
            grid,
            (*arguments, self.eps, heads),
            (constants["BX"], constants["BZ"], self.x.element_size()),
            constants,
            warps,
        )


def launch_measured(
    name: str,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    numbers: tuple[int, ...],
    constants: Constants,
    warps: int,
) -> None:
    """Launches a kernel with the warps and stages that were measured on the card, otherwise with those that are given.

    Args:
        name: what the table calls it.
        kernel: as `launch` takes it.
        grid: likewise.
        arguments: likewise; a tensor comes first.
        numbers: what warps and stages depend on.
        constants: likewise, with `STAGES`.
        warps: likewise.
    """
    constants, warps = _schedule(name, numbers, constants, warps, arguments[0].get_device())
    launch(kernel, grid, arguments, constants, warps, constants["STAGES"])


@functools.cache
def _schedule(
    name: str, numbers: tuple[int, ...], constants: Constants, warps: int, device: int
) -> tuple[Constants, int]:
    if INTERPRETED:
        return constants, warps
    warps, stages = measured(name, numbers, (warps, constants["STAGES"]), SCHEDULES, device)
    return constants if stages == constants["STAGES"] else Constants(constants | {"STAGES": stages}), warps


remembered(_schedule.cache_clear)


@functools.cache
def _constants(
    dtype: torch.dtype, width: int, values: int, chunk: int, family: int, *switches: int
) -> tuple[Constants, int]:
    """Compile-time arguments of a walk, and its warps."""
    names = (
        "UNIT", "A", "B", "FACTOR", "JACOBIAN", "REVERSE", "HAS_START", "TURNED", "STORE_OUT", "STORE_END",
        "STORE_LOST", "STORE_SCALES",
    )  # fmt: skip
    named = dict(zip(names, switches, strict=True))
    half = halved(family, dtype.itemsize)
    columns = padded(values) if named["JACOBIAN"] else NARROW if half else NARROWEST
    warps, most = WARPS, STAGES
    wide = padded(width) * columns > HELD if family < 9 else min(padded(width), padded(values)) > NARROWEST
    if half or (wide and dtype != torch.float32):
        warps, most = 2 * WARPS, 2
        chunk = min(chunk, TOKENS[max(known for known in TOKENS if known <= family)])
    sizes = {"X": width, "Z": values, "BT": chunk, "BX": padded(width), "BZ": columns}
    rows_read = (2 if named["STORE_OUT"] else 1) * sizes["BX"] + (2 if named["JACOBIAN"] else 1) * columns
    sizes["STAGES"] = stages(most, chunk * rows_read, dtype)
    return Constants(sizes | named | arithmetic(dtype)), warps


@functools.cache
def _scan_constants(width: int, values: int, reverse: bool, has_start: bool) -> Constants:
    return Constants({"K": width, "V": values, "BN": 256, "REVERSE": reverse, "HAS_START": has_start})


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments for the dtype of the matrix products; the interpreter takes float32."""
    exact = dtype == torch.float32
    return {
        "FAST": 0 if exact else 1 if INTERPRETED else 2, "DOT": tl.float32 if INTERPRETED else DOT[dtype],
        "PRECISION": "tf32x3" if exact else "tf32",
    }  # fmt: skip


def stages(most: int, numbers: int, dtype: torch.dtype) -> int:
    """Stages of a pipeline that reads so many numbers at each step."""
    return max(1, min(most, PIPELINE // (numbers * dtype.itemsize)))


def padded(width: int) -> int:
    """Columns of a block that holds so many."""
    return max(NARROWEST, 1 << (width - 1).bit_length())
