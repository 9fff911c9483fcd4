"""Measures the operators on this machine's CPU against their references, and checks that both agree.

Every case is a pair of calls with the same meaning. They run in turn, forward and backward, so that whatever else the
machine does falls on both; medians are compared. A case states the ratio that it must reach: the program leaves with
code 1 when one is missed or a result is off.

    python benchmarks/ops_cpu.py --rounds 5 --out docs/results/ops_cpu.json

To add an operator, add its cases to `cases()`.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import farspan
from farspan.ops import gated_linear_attention, metala_attention, short_convolution

Call = Callable[..., Tensor]


@dataclass
class Case:
    """Two calls on the same tensors.

    Attributes:
        name: what is measured.
        slow: the call to compare with.
        fast: the call that is measured.
        inputs: tensors that both take, all differentiated.
        at_least: how many times faster `fast` must be; for `per_token`, see there.
        tolerance: largest error of outputs and gradients, relative to the largest entry.
        per_token: compare the time per token of `fast` on `inputs` with its time on `slow_inputs`, a shorter sequence.
        slow_inputs: tensors of the slow call when they differ; then results are not compared.
    """

    name: str
    slow: Call
    fast: Call
    inputs: list[Tensor]
    at_least: float
    tolerance: float = 1e-4
    per_token: bool = False
    slow_inputs: list[Tensor] | None = None


def cases() -> Iterator[Case]:
    """All cases; tensors are made when a case's turn comes."""
    gated = "gated linear attention, B=1 H=4 K=32 V=64"
    yield Case(f"{gated} T=4096, ordinary gates", _first(gated_linear_attention, "reference"),
               _first(gated_linear_attention), _gated(4096, -3.0), at_least=20)  # fmt: skip
    yield Case(f"{gated} T=4096, gates down to z=-100", _first(gated_linear_attention, "reference"),
               _first(gated_linear_attention), _gated(4096, -100.0), at_least=8)  # fmt: skip
    yield Case(f"{gated}, time per token T=2048 over T=16384", _first(gated_linear_attention),
               _first(gated_linear_attention), _gated(16384, -3.0), at_least=1 / 1.3, per_token=True,
               slow_inputs=_gated(2048, -3.0))  # fmt: skip
    q, _, v, _ = _gated(4096, -3.0)
    metala = [q, 3 * torch.randn_like(q), v, torch.randn(4, 32)]
    yield Case("MetaLA attention, B=1 H=4 K=32 V=64 T=4096", _first(metala_attention, "reference"),
               _first(metala_attention), metala, at_least=12)  # fmt: skip
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        tensors = [torch.randn(1, 4096, 512).to(dtype), torch.randn(512, 4).to(dtype)]
        yield Case(f"short convolution against conv1d(groups=D), D=512 W=4 T=4096, {str(dtype)[6:]}",
                   _grouped_convolution, _first(short_convolution), tensors, at_least=1.5,
                   tolerance=tolerance)  # fmt: skip


def _gated(length: int, lowest: float) -> list[Tensor]:
    """q, k, v and the log decay; below -3, every other channel has the lowest logit throughout."""
    q, k, logits = (torch.randn(1, length, 4, 32) for _ in range(3))
    logits = 3 * logits
    if lowest < -3:
        logits[..., ::2] = lowest
    return [q, k, torch.randn(1, length, 4, 64), F.logsigmoid(logits) / 16]


def _first(op: Callable[..., Any], backend: str = "auto") -> Call:
    return lambda *tensors: op(*tensors, backend=backend)[0]


def _grouped_convolution(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), groups=x.shape[2])).mT


def run(call: Call, inputs: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Seconds of one forward and backward, and the output with all gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    start = time.perf_counter()
    out = call(*leaves)
    middle = time.perf_counter()
    weight = torch.arange(out.numel(), dtype=torch.float32).sin_().reshape(out.shape).to(out.dtype)
    again = time.perf_counter()
    out.backward(weight)
    seconds = middle - start + time.perf_counter() - again
    return seconds, [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Runs a case `rounds` times after one warm-up; the fast call runs three times as often."""
    slow_inputs = case.inputs if case.slow_inputs is None else case.slow_inputs
    _, want = run(case.slow, slow_inputs)
    _, got = run(case.fast, case.inputs)
    error = None
    if case.slow_inputs is None:
        pairs = zip(got, want, strict=True)
        error = max(float((g.double() - w.double()).abs().max() / w.double().abs().max()) for g, w in pairs)
    slow, fast = [], []
    for _ in range(rounds):
        slow.append(run(case.slow, slow_inputs)[0])
        fast += [run(case.fast, case.inputs)[0] for _ in range(3)]
    ratio = statistics.median(slow) / statistics.median(fast)
    if case.per_token:
        ratio *= case.inputs[0].shape[1] / slow_inputs[0].shape[1]
    passed = ratio >= case.at_least and (error is None or error <= case.tolerance)
    return {
        "name": case.name,
        "slow_ms": 1e3 * statistics.median(slow),
        "fast_ms": 1e3 * statistics.median(fast),
        "ratio": ratio,
        "at_least": case.at_least,
        "error": error,
        "tolerance": None if error is None else case.tolerance,
        "passed": passed,
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> int:
    """Measures all cases, prints a table, writes the results; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of the slow call; the fast one runs three times each"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/ops_cpu.json"), help="where to write the results"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table("operator, forward and backward", "compared with, ms", "ours, ms", "ratio", "at least", "error", "")
    results = []
    for case in cases():
        result = measure(case, options.rounds)
        results.append(result)
        error = "" if result["error"] is None else f"{result['error']:.1e}"
        numbers = (f"{result[key]:.2f}" for key in ("slow_ms", "fast_ms", "ratio", "at_least"))
        table.add_row(result["name"], *numbers, error, "ok" if result["passed"] else "MISSED")
    Console(width=160).print(table)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "threads": options.threads, "system": platform.system()},
        "versions": {
            "farspan": farspan.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rounds": options.rounds,
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
