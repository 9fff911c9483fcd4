"""State space duality through kernels: walks for states and their gradients, then everything by chunks."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farspan.ops._contract import plain_backward
from farspan.ops._launch import Constants, compile_ahead, launch
from farspan.ops._library import register_node
from farspan.ops.gated_linear import rows
from farspan.ops.gated_linear.kernels import scan_kernel
from farspan.ops.gated_linear.plan import Plan, cut, most_chunks, plan_chunks
from farspan.ops.gated_linear.tiles import SCAN, WIDEST, chunk_of, family, halved
from farspan.ops.gated_linear.triton import gated_linear_attention_triton
from farspan.ops.ssd.gradient_kernels import shared_gradient_kernel, step_gradient_kernel, value_gradient_kernel
from farspan.ops.ssd.kernels import output_kernel, prepare_kernel, state_kernel
from farspan.ops.ssd.reference import through

# Most stages of the kernels for states, outputs, what the heads of a group share, and values.
STATE, OUTPUT, SHARED, VALUE = 3, 3, 2, 3
WARPS = 4
# Most heads of a program for steps and decays.
HEADS = 16


def state_space_duality_triton(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernels' form of `state_space_duality`; arguments and results as the reference's."""
    if not holds(c.dtype, c.shape[-1], x.shape[-1]):
        return through(gated_linear_attention_triton, x, dt, a, b, c, d, **options)
    low, high = (min(limit, torch.finfo(torch.float32).max) for limit in options["dt_limit"])
    given = c, b, x, dt, a, d, options["dt_bias"], options["initial_state"]
    tensors = (None if t is None else t.contiguous() for t in given)
    out, final = _Duality.apply(*tensors, options["cu_seqlens"], options["dt_softplus"], low, high)
    return out, final


def holds(dtype: torch.dtype, width: int, values: int) -> bool:
    """Whether these kernels hold so many state and value channels per head; gated linear attention's serve beyond.

    In float32 a chunk of 64 tokens of 128 channels is more than the shared memory of a card of compute capability 8.0.
    """
    return max(width, values) <= (WIDEST // 2 if dtype == torch.float32 else WIDEST)


class _Duality(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, final, *kept = duality_node(*arguments)
        if not torch.compiler.is_compiling():  # where a missing gradient costs nothing anyway
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:9], *kept)
        ctx.options = arguments[9:]
        return out, final

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        *direct, sums, d_initial = duality_gradient_node(*gradients, *saved, *ctx.options)
        given = (*sums, d_initial)
        indirect = (None if t is None else g.to(t.dtype) for t, g in zip(saved[4:8], given, strict=True))
        return *direct, *indirect, *[None] * 4


class _Inputs(NamedTuple):
    """The tensors of a call: q is c, k is b, v is x; and the options of its steps."""

    q: Tensor
    k: Tensor
    v: Tensor
    dt: Tensor
    a: Tensor
    skip: Tensor | None
    bias: Tensor | None
    initial: Tensor | None
    cu_seqlens: Tensor | None
    softplus: bool
    low: float
    high: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads, heads of a group, and rows of all sequences: what most kernels take last."""
        batch, length, heads, _ = self.v.shape
        return heads, heads // self.q.shape[2], batch * length

    @property
    def blocks(self) -> int:
        """Programs of the walk that share the value channels."""
        return -(-self.v.shape[3] // rows.NARROWEST)

    def constants(self, most: int, tiles: int, *switches: tuple[str, int]) -> Constants:
        """Compile-time arguments of a kernel that reads so many tiles of values and states at each step."""
        return _constants(self.q.dtype, self.q.shape[3], self.v.shape[3], chunk_of(self.q), most, tiles, *switches)

    def plan(self) -> Plan:
        return plan_chunks(self.v, self.cu_seqlens, chunk_of(self.q), self.v.shape[2] * self.blocks)


def _results(*arguments: Any) -> tuple[Tensor, ...]:
    """Room for the outputs, and for what the gradient needs: the states in front of all chunks, steps, decays."""
    x = _Inputs(*arguments)
    batch, length, heads, values = x.v.shape
    sequences = batch if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    chunks = most_chunks(length, batch, x.cu_seqlens, chunk_of(x.q))
    final = x.v.new_empty(sequences, heads, x.q.shape[3], values, dtype=torch.float32)
    states = x.v.new_empty(chunks, *final.shape[1:])
    step = final.new_empty(heads, batch * length)
    total = torch.empty_like(step, dtype=torch.float64 if x.v.dtype == torch.float32 else torch.float32)
    return torch.empty_like(x.v), final, states, step, total


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    x, results = _Inputs(*arguments), _results(*arguments)
    if x.v.numel() == 0:
        results[1].zero_() if x.initial is None else results[1].copy_(x.initial)
        return results
    with torch.cuda.device_of(x.q):
        kinds = (t is not None and t.dtype for t in x[:8])
        compile_ahead(("duality", x.q.device, x.q.shape[3], x.v.shape[3], x.softplus, *kinds), lambda: _rehearse(x))
        _run(x, x.plan(), results)
    return results


def _run(x: _Inputs, plan: Plan, results: tuple[Tensor, ...]) -> None:
    out, final, states, step, total = results
    chunks, heads = plan.chunks.shape[0], x.v.shape[2]
    by_group = chunks, x.q.shape[2]
    constants = _step_constants(heads, chunk_of(x.q), x.bias is not None, x.softplus)
    bias, skip = (x.a if t is None else t for t in (x.bias, x.skip))
    arguments: tuple[Any, ...] = (x.dt, x.a, bias, step, total, plan.chunks, x.low, x.high, heads, x.sizes[2])
    launch(prepare_kernel, (chunks, -(-heads // constants["BH"])), arguments, constants, WARPS)
    _walk(x, plan, (x.k, x.v, step, total), x.initial, final, states)
    arguments = (x.q, x.k, x.v, step, total, skip, states, out, plan.chunks, *x.sizes)
    _launch(output_kernel, by_group, arguments, x.constants(OUTPUT, 1, ("HAS_SKIP", x.skip is not None)))


def _walk(
    x: _Inputs,
    plan: Plan,
    tensors: tuple[Tensor, ...],
    start: Tensor | None,
    end: Tensor,
    states: Tensor,
    entering: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """The states in front of all chunks, or in reverse, where those entering are given, the gradients behind them.

    Args:
        x: the call.
        plan: where segments and chunks lie.
        tensors: keys, values, steps and decays; in reverse queries and dy take the place of keys and values.
        start: the state in front of each sequence, or None for zeros.
        end: receives the state after each sequence.
        states: receives the state at each chunk.
        entering: the states in front of all chunks.
        kept: receives their products with the gradients behind, `[chunks, H, blocks]`.
    """
    (heads, *_), reverse, before = x.sizes, entering is not None, start
    shape = plan.segments.shape[0], *end.shape[1:]

    def run(start: Tensor | None, end: Tensor | None, lost: Tensor | None, states: Tensor | None) -> None:
        stores = states is not None
        switches = {
            "REVERSE": reverse, "HAS_START": start is not None, "STORE_STATES": stores, "STORE_END": end is not None,
            "STORE_LOST": lost is not None, "HAS_INITIAL": reverse and stores and x.initial is not None,
        }  # fmt: skip
        given = (start, end, lost, states, entering, x.initial, kept)
        arguments: tuple[Any, ...] = (*tensors, *(x.a if t is None else t for t in given), plan.segments, *x.sizes)
        constants = x.constants(STATE, 0, *switches.items(), ("BV", rows.NARROWEST))
        _launch(state_kernel, (shape[0], heads, x.blocks), arguments, constants)

    if not plan.whole:
        added, before = end.new_empty(shape), end.new_empty(shape)
        lost = added.new_empty(shape[:3])
        run(None, added, lost, None)
        constants = rows._scan_constants(*shape[2:], reverse, start is not None)
        arguments = (added, lost, added if start is None else start, before, end, plan.offsets, heads)
        grid = plan.offsets.shape[0] - 1, heads, -(-shape[2] * shape[3] // constants["BN"])
        launch(scan_kernel, grid, arguments, constants, *SCAN[1:])
    run(before, end if plan.whole else None, None, states)


def _gradients(d_out: Tensor | None, d_final: Tensor | None, *saved: Any) -> tuple[Tensor, ...]:
    """Room for the gradients of q, k, v and dt, of a, skip and bias in one, and of the initial state."""
    x, final = _Inputs(*saved[:9], *saved[12:]), _results(*saved[:9], *saved[12:])[1]
    return *(torch.empty_like(t) for t in x[:4]), final.new_empty(3, final.shape[1]), final


def _backward(d_out: Tensor | None, d_final: Tensor | None, *saved: Any) -> tuple[Tensor, ...]:
    x, results = _Inputs(*saved[:9], *saved[12:]), _gradients(d_out, d_final, *saved)
    if x.v.numel() == 0:
        for gradient in results:
            gradient.zero_()
        if d_final is not None:
            results[-1].copy_(d_final)
        return results
    d_out = torch.zeros_like(x.v) if d_out is None else d_out.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    with torch.cuda.device_of(x.q):
        _run_backward(x, x.plan(), d_out, d_final, saved[9:12], results)
    return results


def _run_backward(
    x: _Inputs,
    plan: Plan,
    d_out: Tensor,
    d_final: Tensor | None,
    saved: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
) -> None:
    states, step, total = saved
    dq, dk, dv, d_dt, sums, d_initial = results
    chunks, heads = plan.chunks.shape[0], x.v.shape[2]
    by_group = chunks, x.q.shape[2]
    d_states, asked = torch.empty_like(states), torch.empty_like(step)
    kept, parts = step.new_empty(chunks, heads, x.blocks), step.new_empty(chunks, *sums.shape)
    _walk(x, plan, (x.q, d_out, step, total), d_final, d_initial, d_states, states, kept)
    decays = step, total
    arguments: tuple[Any, ...] = (x.k, x.q, d_out, x.v, *decays, states, dq, asked, plan.chunks, *x.sizes)
    _launch(shared_gradient_kernel, by_group, arguments, x.constants(SHARED, 2, ("LATER", False)))
    arguments = (x.q, x.k, x.v, d_out, *decays, d_states, dk, asked, plan.chunks, *x.sizes)
    _launch(shared_gradient_kernel, by_group, arguments, x.constants(SHARED, 2, ("LATER", True)))
    skip, bias = (x.a if t is None else t for t in (x.skip, x.bias))
    dw, net, left, skipped = (torch.empty_like(step) for _ in range(4))
    arguments = (
        x.q, x.k, x.v, skip, *decays, d_out, d_states, dv, dw, net, left, skipped, plan.chunks, *x.sizes,
    )  # fmt: skip
    _launch(value_gradient_kernel, by_group, arguments, x.constants(VALUE, 2, ("HAS_SKIP", x.skip is not None)))
    constants = _step_constants(heads, chunk_of(x.q), x.bias is not None, x.softplus, x.blocks)
    arguments = (
        x.dt, x.a, bias, step, asked, net, left, dw, skipped, kept, d_dt, parts, plan.chunks, x.low, x.high, heads,
        x.sizes[2],
    )  # fmt: skip
    launch(step_gradient_kernel, (chunks, -(-heads // constants["BH"])), arguments, constants, WARPS)
    torch.sum(parts, 0, out=sums)


def _rehearse(x: _Inputs) -> None:
    """Makes all launches on sequences of two chunks, cut into two segments and whole."""
    chunk = chunk_of(x.q)
    length = 2 * chunk
    q, k, v, dt = (t.new_empty(1, length, *t.shape[2:]) for t in x[:4])
    initial = None if x.initial is None else x.initial.new_empty(1, *x.initial.shape[1:])
    x = x._replace(q=q, k=k, v=v, dt=dt, initial=initial, cu_seqlens=None)
    for segment in (length, chunk):
        plan, results = cut([(0, length)], segment, chunk, x.q.device), _results(*x)
        _run(x, plan, results)
        _run_backward(x, plan, x.v, None, results[2:], _gradients(None, None, *x[:9], *results[2:], *x[9:]))


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Constants) -> None:
    numbers = constants["BK"], constants["BV"], arguments[0].element_size()
    warps = _warps(family(arguments[0].get_device()), numbers)
    rows.launch_measured(f"ssd.{kernel.__name__}", kernel, grid, arguments, numbers, constants, warps)


@functools.cache
def _warps(family: int, numbers: tuple[int, int, int]) -> int:
    """Warps of a program that holds so many state and value channels, of so many bytes."""
    width, values, size = numbers
    few = size > 2 or (values <= rows.NARROWEST and (family > 8 or width <= rows.NARROWEST))
    return WARPS if few and not halved(family, size) else 2 * WARPS


@functools.cache
def _constants(
    dtype: torch.dtype, width: int, values: int, chunk: int, most: int, tiles: int, *switches: tuple[str, int]
) -> Constants:
    shape = {"K": width, "V": values, "BT": chunk, "BK": rows.padded(width), "BV": rows.padded(values)}
    shape |= dict(switches)
    # The walk reads keys and values, in reverse states too; the others values, perhaps dy, and states.
    walked = chunk * (shape["BK"] + shape["BV"]) + shape.get("REVERSE", 0) * shape["BK"] * shape["BV"]
    shape["STAGES"] = rows.stages(most, (tiles * chunk + shape["BK"]) * shape["BV"] if tiles else walked, dtype)
    arithmetic = rows.arithmetic(dtype)
    return Constants(shape | {name: arithmetic[name] for name in ("DOT", "PRECISION")})


@functools.cache
def _step_constants(heads: int, chunk: int, biased: bool, softplus: bool, blocks: int | None = None) -> Constants:
    block = min(HEADS, 1 << (heads - 1).bit_length())
    constants = Constants({"BT": chunk, "BH": block, "BIASED": biased, "SOFTPLUS": softplus})
    return constants if blocks is None else Constants(constants | {"BLOCKS": blocks})


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor dt, Tensor a, Tensor? skip, Tensor? bias, Tensor? initial, Tensor? cu_seqlens"
)
_SAVED = "Tensor states, Tensor step, Tensor total"
_OPTIONS = "bool softplus, float low, float high"
duality_node = register_node(
    f"state_space_duality_kernels({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor final, {_SAVED})", _forward, _results
)
duality_gradient_node = register_node(
    f"state_space_duality_kernels_gradient(Tensor? d_out, Tensor? d_final, {_INPUTS}, {_SAVED}, {_OPTIONS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor d_dt, Tensor sums, Tensor d_initial)",
    _backward,
    _gradients,
)
