"""Launching Triton kernels: little work per launch, and all kernels of an operator compiled side by side at its first.

A launch through Triton's own front costs tens of microseconds, most of it to find out that nothing has changed. Here a
launch is looked up by the dtypes of its tensors and its compile-time arguments alone.
"""

import functools
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from farspan.ops._tiles import measured, remembered

Argument = Tensor | tuple[Tensor, ...] | float
# Packages whose kernels ask for their tiles themselves, warps and stages included.
OWN_TILES = ("gated_linear", "ssd")
# The interpreter takes every launch as it comes, and knows no compiler.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Constants(dict[str, Any]):
    """Compile-time arguments by name, told apart by identity: whoever makes them keeps them."""

    __hash__ = object.__hash__  # type: ignore[assignment]


_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}
_pending: dict[Hashable, Future[Any]] = {}
_rehearsed: set[Hashable] = set()
_lock = threading.Lock()


class _Rehearsal(threading.local):
    jobs: list[tuple[Hashable, Callable[[], Any]]] | None = None


_rehearsal = _Rehearsal()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Argument],
    constants: Constants,
    warps: int,
    stages: int = 1,
    registers: int | None = None,
) -> None:
    """Starts a kernel on the device of its tensors and the current stream there.

    Args:
        kernel: a `triton.jit` function that specialises no integer.
        grid: number of programs along one to three axes; no program, no launch.
        arguments: tensors, tuples of tensors, and numbers, in the kernel's order; one tensor at least stands by itself.
        constants: the kernel's compile-time arguments, all of those that follow; the same object at every launch.
        warps: warps of a program, unless others were measured on the card.
        stages: depth of the pipelines of loops, likewise.
        registers: most registers of a thread, so that more programs share a multiprocessor; None leaves it open.
    """
    if 0 in grid:
        return
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    device, aligned = -1, True
    kinds: list[torch.dtype | tuple[torch.dtype, ...] | int | None] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            kinds.append(argument.dtype)
            device = argument.get_device()
            aligned &= argument.data_ptr() % 16 == 0
        elif isinstance(argument, tuple):
            kinds.append(tuple(x.dtype for x in argument))
            aligned &= not any(x.data_ptr() % 16 for x in argument)
        else:
            kinds.append(argument >> 31 if isinstance(argument, int) else None)
    if device != torch.cuda.current_device():  # Triton takes the current one, whatever it is given
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, constants, warps, stages, registers)
        return
    key = (constants, device, warps, stages, registers, id(kernel), *kinds)
    if _rehearsal.jobs is None and aligned and (known := _compiled.get(key)) is not None:
        binary, rest = known
        binary[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    sizes = tuple(x.itemsize for x in kinds if isinstance(x, torch.dtype))
    warps, stages = _schedule(kernel, constants, sizes, warps, stages, device)
    options = {**constants, "num_warps": warps, "num_stages": stages, "maxnreg": registers}
    if _rehearsal.jobs is not None:
        _rehearsal.jobs.append((key, functools.partial(_compile, device, kernel, grid, arguments, options)))
        return
    with _lock:
        compiling = _pending.pop(key, None)
    if compiling is not None:
        compiling.result()
    binary = kernel[grid](*arguments, **options)
    if aligned:
        _compiled[key] = binary, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def evenly(x: Tensor) -> Tensor:
    """x `[B, T, D]`, or a copy, with channels side by side and all rows of all batches evenly apart."""
    even = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if even else x.contiguous()


@functools.cache
def _schedule(
    kernel: Any, constants: Constants, sizes: tuple[int, ...], warps: int, stages: int, device: int
) -> tuple[int, int]:
    """Warps and stages of a kernel: those that were measured on the card, otherwise the given ones."""
    package = kernel.__module__.split(".")[-2]
    if package in OWN_TILES:
        return warps, stages
    numbers = [f"{name}={value}".replace(" ", "") for name, value in constants.items()]
    others = [(max(1, warps // 2), stages), (min(16, 2 * warps), stages), *((warps, depth) for depth in (1, 2, 3, 4))]
    numbers.append("".join(map(str, sizes)))
    return measured(f"{package}.{kernel.__name__}", numbers, (warps, stages), others, device)


def _forget() -> None:
    """Kernels of other warps and stages are wanted from now on."""
    _schedule.cache_clear()
    _compiled.clear()


remembered(_forget)


def compile_ahead(key: Hashable, rehearse: Callable[[], object]) -> None:
    """Begins to compile, in threads, all kernels that a function would launch; later calls with the key do nothing.

    Args:
        key: what the kernels depend on.
        rehearse: makes the launches on small tensors, of which only dtypes matter; nothing is launched.
    """
    if INTERPRETED or key in _rehearsed or _rehearsal.jobs is not None:
        return
    _rehearsed.add(key)
    jobs: list[tuple[Hashable, Callable[[], Any]]] = []
    _rehearsal.jobs = jobs
    try:
        rehearse()
    finally:
        _rehearsal.jobs = None
    with _lock:
        for name, job in dict(jobs).items():
            if name not in _compiled and name not in _pending:
                _pending[name] = _pool().submit(job)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="farspan-compile")


def _compile(
    device: int, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Argument], options: Mapping[str, Any]
) -> None:
    with torch.cuda.device(device):
        binary = kernel.warmup(*arguments, grid=grid, **options)
    # The host's part of a launch is C code in some versions of Triton, which a first launch would wait for.
    triton.runtime.driver.active.launcher_cls(binary.src, binary.metadata)
