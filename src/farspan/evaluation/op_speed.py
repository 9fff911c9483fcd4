"""Measures one operator: device time, eager time, memory, first call, launches."""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from farspan.evaluation.op_cases import CASES
from farspan.evaluation.op_workload import OpCase, Workload

Step = Callable[[], Any]
# Run in a process of its own, which prints the seconds last.
_FIRST_CALL = "import sys; from farspan.evaluation.op_speed import first_call; print(first_call(*sys.argv[1:]))"


@dataclass(frozen=True)
class OpSpeed:
    """One operator at one shape. On a GPU, device times are of replayed CUDA graphs: no host in between.

    Attributes:
        operator, rows, tokens: what was measured.
        forward_ms, both_ms: median of the forward pass, and of forward and backward; None where a pass cannot run.
        eager_ms: median of forward and backward as a program calls it.
        first_call_s: the first forward and backward, compilation included.
        extra_gib: peak of memory beyond the inputs and the output's gradient: the output, the inputs' gradients and
            what lies between; None on a CPU.
        launches: kernels, copies and fills of forward and backward; None on a CPU.
        gigabytes_per_second: inputs and output of the forward pass, each moved once, over its time.
        teraflops_per_second: operations that the formula needs, forward and backward, over their time.
        note: why a figure is missing.
    """

    operator: str
    rows: int
    tokens: int
    forward_ms: float | None = None
    both_ms: float | None = None
    eager_ms: float | None = None
    first_call_s: float | None = None
    extra_gib: float | None = None
    launches: int | None = None
    gigabytes_per_second: float | None = None
    teraflops_per_second: float | None = None
    note: str = ""


def op_speed(
    name: str,
    case: OpCase,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 20,
    cold: bool = False,
) -> OpSpeed:
    """Measures a case; what goes wrong in it (memory, a compiler) becomes the note of its row.

    Args:
        name: the case's name in `op_cases.CASES`, shown in the row.
        case: what to measure.
        rows, tokens: its shape.
        dtype: type of the inputs.
        device: where.
        repeats: runs of which the median is taken.
        cold: whether the first call is that of a process that finds no compiled kernel.
    """
    reason = case.missing(device, tokens)
    if reason is not None:
        return OpSpeed(name, rows, tokens, note=reason)
    try:
        found = _measured(name, case.make(rows, tokens, dtype, device), rows, tokens, device, repeats)
        if cold:
            found = dataclasses.replace(found, first_call_s=cold_first_call(name, rows, tokens, dtype, device))
        return found
    except Exception as error:  # peers and compilers raise errors of their own
        return OpSpeed(name, rows, tokens, note=(str(error).strip() or type(error).__name__).splitlines()[0][:200])


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device does at best: a copy in GB/s (read and written), a matrix product in TFLOP/s."""
    gpu = device.type == "cuda"
    source = torch.empty(2**30 if gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if gpu else 512
    a = torch.randn(size, size, device=device).to(dtype)
    return {
        "copy_gigabytes_per_second": 2 * source.numel() / timed(lambda: target.copy_(source), 10, device) / 1e6,
        "matmul_teraflops_per_second": 2 * size**3 / timed(lambda: a @ a, 10, device) / 1e9,
    }


def steps(workload: Workload) -> tuple[Step, Step | None]:
    """The forward pass without gradients, and forward and backward; None where nothing is differentiable."""
    leaves, call = workload.leaves, workload.call

    def forward() -> None:
        with torch.no_grad():
            call(leaves)

    with torch.no_grad():
        out = call(leaves)
    if not out.is_floating_point():
        return forward, None
    gradient = torch.randn_like(out)

    def both() -> None:
        workload.forget()
        call(leaves).backward(gradient)

    return forward, both


def first_call(name: str, rows: str, tokens: str, dtype: str, device: str) -> float:
    """Seconds of the first forward and backward of a case in this process; arguments as written on a command line."""
    place = torch.device(device)
    workload = CASES[name].make(int(rows), int(tokens), getattr(torch, dtype), place)
    # The device's own start, and what PyTorch imports at the first backward pass of any program.
    out_of_the_clock = torch.ones(8, device=place, requires_grad=True)
    (2 * out_of_the_clock).backward(torch.ones_like(out_of_the_clock))
    assert out_of_the_clock.grad is not None and out_of_the_clock.grad.sum().item() == 16
    return _first(workload, place)


def cold_first_call(name: str, rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """`first_call` in a new process whose Triton cache is empty; imports and the device's start are not counted.

    PyTorch's own import at its first backward pass (sympy, 2 to 4 s where Python cannot keep bytecode) is one of them.

    Raises:
        RuntimeError: the process failed; with the last line that it wrote, or its exit code if it wrote none.
    """
    arguments = [name, str(rows), str(tokens), str(dtype).removeprefix("torch."), str(device)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", _FIRST_CALL, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise RuntimeError(f"the first call in a new process failed: {said[-1]}")
    return float(done.stdout.split()[-1])


def captured(step: Step) -> Step:
    """The step as a CUDA graph to replay, after three runs that compile and allocate; keeps the step's tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def replay(_held: Step = step) -> None:
        graph.replay()

    return replay


def device_time(step: Step, repeats: int = 20) -> float:
    """Median milliseconds of a replay of the captured step."""
    return timed(captured(step), repeats)


def timed(step: Step, repeats: int = 20, device: torch.device | None = None) -> float:
    """Median milliseconds of a step: between events of a GPU (the default), on the clock elsewhere."""
    return interleaved([step], repeats, device)[0]


def interleaved(several: Sequence[Step], repeats: int = 20, device: torch.device | None = None) -> list[float]:
    """Median milliseconds of each step, run in turns, so that a drift of the device's clock meets all of them."""
    for step in several:
        step()
    times: list[list[float]] = [[] for _ in several]
    for _ in range(repeats):
        for step, found in zip(several, times, strict=True):
            found.append(_once(step, device is None or device.type == "cuda"))
    return [statistics.median(found) for found in times]


def launches(step: Step) -> int:
    """Kernels, copies and fills of one step on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in record.events())


def extra_memory(workload: Workload, step: Step) -> float:
    """Peak GiB of a step beyond the workload's inputs and what the step holds, the output's gradient."""
    workload.forget()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _measured(name: str, workload: Workload, rows: int, tokens: int, device: torch.device, repeats: int) -> OpSpeed:
    first = _first(workload, device)
    forward, both = steps(workload)
    gpu, note, whole = device.type == "cuda", "", both or forward
    extra = extra_memory(workload, whole) if gpu and both else None
    eager = timed(whole, repeats, device)
    forward_ms, whole_ms = timed(forward, repeats, device), eager
    if gpu:
        try:
            forward_ms = device_time(forward, repeats)
            whole_ms = device_time(whole, repeats) if both else forward_ms
        except RuntimeError as error:
            note = f"not captured, eager times: {str(error).splitlines()[0][:120]}"
    with torch.no_grad():
        moved = workload.nbytes + workload.call(workload.leaves).nbytes
    return OpSpeed(
        name,
        rows,
        tokens,
        forward_ms=forward_ms,
        both_ms=whole_ms if both else None,
        eager_ms=eager,
        first_call_s=first,
        extra_gib=extra,
        launches=launches(whole) if gpu else None,
        gigabytes_per_second=moved / forward_ms / 1e6,
        teraflops_per_second=(1 + workload.backward) * workload.flops / whole_ms / 1e9 if workload.flops else None,
        note=note,
    )


def _first(workload: Workload, device: torch.device) -> float:
    """Seconds of one forward and backward, compilation included."""
    begun = time.perf_counter()
    out = workload.call(workload.leaves)
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _once(step: Step, gpu: bool) -> float:
    if not gpu:
        begun = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - begun)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
