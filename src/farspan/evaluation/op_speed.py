"""Measures one operator: device time, eager time, memory, first call, launches."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from farspan.evaluation.op_cases import OpCase, Workload, moved_bytes


@dataclass(frozen=True)
class OpSpeed:
    """One operator at one shape. On a GPU, device times are of replayed CUDA graphs: no host in between.

    Attributes:
        operator, rows, tokens: what was measured.
        forward_ms, both_ms: median of the forward pass, and of forward and backward; None where a pass cannot run.
        eager_ms: median of forward and backward as a program calls it.
        first_call_s: the first forward and backward, compilation included.
        extra_gib: peak of memory beyond what was there before; None on a CPU.
        launches: kernels of forward and backward; None on a CPU.
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
    name: str, case: OpCase, rows: int, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int = 20
) -> OpSpeed:
    """Measures a case; what goes wrong in it (memory, a compiler) becomes the note of its row."""
    reason = case.missing(device)
    if reason is not None:
        return OpSpeed(name, rows, tokens, note=reason)
    try:
        return _measured(name, case.make(rows, tokens, dtype, device), rows, tokens, device, repeats)
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        return OpSpeed(name, rows, tokens, note=(str(error).strip() or type(error).__name__).splitlines()[0][:200])


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device does at best: a copy in GB/s (read and written), a matrix product in TFLOP/s."""
    gpu = device.type == "cuda"
    source = torch.empty(2**28 if gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if gpu else 512
    a = torch.randn(size, size, device=device).to(dtype)
    return {
        "copy_gigabytes_per_second": 2 * source.numel() / _median(lambda: target.copy_(source), device, 10) / 1e9,
        "matmul_teraflops_per_second": 2 * size**3 / _median(lambda: a @ a, device, 10) / 1e12,
    }


def _measured(name: str, workload: Workload, rows: int, tokens: int, device: torch.device, repeats: int) -> OpSpeed:
    leaves, call = workload.leaves, workload.call
    with torch.no_grad():
        out = call(leaves)
    gradient, moved = torch.randn_like(out), moved_bytes(workload, out)
    del out

    def forward() -> None:
        with torch.no_grad():
            call(leaves)

    def both() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        call(leaves).backward(gradient)

    first = _median(both, device, 1, warmup=0)
    gpu, note = device.type == "cuda", ""
    extra = launches = None
    if gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30
        launches = _launches(both)
    eager = _median(both, device, repeats)
    forward_s, both_s = _median(forward, device, repeats), eager
    if gpu:
        try:
            forward_s, both_s = (_median(_captured(step), device, repeats) for step in (forward, both))
        except RuntimeError as error:
            note = f"not captured, eager times: {str(error).splitlines()[0][:120]}"
    return OpSpeed(
        name,
        rows,
        tokens,
        forward_ms=1000 * forward_s,
        both_ms=1000 * both_s,
        eager_ms=1000 * eager,
        first_call_s=first,
        extra_gib=extra,
        launches=launches,
        gigabytes_per_second=moved / forward_s / 1e9,
        teraflops_per_second=(1 + workload.backward) * workload.flops / both_s / 1e12,
        note=note,
    )


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, after three runs that compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def _launches(step: Callable[[], None]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in record.key_averages() if event.self_device_time_total > 0)


def _median(step: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 1) -> float:
    """Median seconds of a step: between device events on a GPU, on the clock elsewhere."""
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda" and warmup:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begun = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)
