"""Measures every attention operator on this machine's CPU against causal softmax attention in the same run.

Float32, one sequence, 4 heads of 64, forward and backward, on two threads. The table gives the time at T = 8192, how
many times faster than PyTorch's causal SDPA that is, and how the time grows from T = 2048 to T = 32768 (16 is linear,
256 quadratic). The program leaves with code 1 when an operator misses the ratio it states.

    python benchmarks/attention_cpu.py --out docs/results/attention_cpu.json

To add an operator, add a line to `OPERATORS`.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import farspan
from farspan.ops import (
    cosine_attention,
    dilated_attention,
    dynamic_mask_attention,
    metala_attention,
    softmax_attention,
    state_space_duality,
)
from ops_cpu import processor, run

HEADS, WIDTH = 4, 64


def _normal(length: int, *shape: int) -> Tensor:
    return torch.randn(1, length, *shape)


def _qkv(length: int) -> list[Tensor]:
    return [_normal(length, HEADS, WIDTH) for _ in range(3)]


def _ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return state_space_duality(x, dt, a, b, c)[0]


# name -> (call, inputs for a length, times faster than SDPA at T = 8192)
OPERATORS: dict[str, tuple[Callable[..., Tensor], Callable[[int], list[Tensor]], float]] = {
    "softmax": (softmax_attention, _qkv, 0.0),
    "cosine": (
        lambda q, k, v, exponent: cosine_attention(q, k, v, exponent)[0],
        lambda length: [*_qkv(length), torch.randn(HEADS)],
        8.0,
    ),
    "metala": (
        lambda q, z, v, w: metala_attention(q, z, v, w)[0],
        lambda length: [*_qkv(length), torch.randn(HEADS, WIDTH)],
        8.0,
    ),
    "ssd": (
        _ssd,
        lambda length: [
            _normal(length, HEADS, WIDTH),
            _normal(length, HEADS),
            -torch.rand(HEADS),
            _normal(length, 1, WIDTH),
            _normal(length, 1, WIDTH),
        ],
        8.0,
    ),
    "dilated (512,1) (1024,2) (2048,4)": (
        lambda q, k, v: dilated_attention(q, k, v, segment_lengths=(512, 1024, 2048), dilations=(1, 2, 4)),
        _qkv,
        3.0,
    ),
    "dynamic_mask w=256, expiry included": (
        lambda q, k, v, bias: dynamic_mask_attention(q, k, v, bias, keep=256),
        lambda length: [*_qkv(length), _normal(length, HEADS)],
        2.0,
    ),
}


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def measure(call: Callable[..., Tensor], inputs: list[Tensor], rounds: int) -> list[float]:
    """Seconds of `rounds` forward and backward passes, after one that warms up."""
    run(call, inputs)
    return [run(call, inputs)[0] for _ in range(rounds)]


def main() -> int:
    """Measures all operators, prints a table, writes the results; 1 if one misses its ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed passes per operator and length")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch may use")
    parser.add_argument("--out", type=Path, default=Path("docs/results/attention_cpu.json"), help="where to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table("operator, forward and backward", "T=8192, ms", "SDPA, ms", "times faster", "at least", "growth", "")
    results: list[dict[str, Any]] = []
    for name, (call, inputs, at_least) in OPERATORS.items():
        # In turn, so that whatever else the machine does falls on both.
        qkv, ours = _qkv(8192), inputs(8192)
        pairs = [(measure(_sdpa, qkv, 1)[0], measure(call, ours, 1)[0]) for _ in range(options.rounds)]
        sdpa, time = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        short = statistics.median(measure(call, inputs(2048), options.rounds))
        long = statistics.median(measure(call, inputs(32768), 1 if name == "softmax" else 2))
        ratio, growth = sdpa / time, long / short
        passed = ratio >= at_least
        results.append(
            {
                "name": name,
                "ms": time,
                "sdpa_ms": sdpa,
                "ratio": ratio,
                "at_least": at_least,
                "growth_2048_to_32768": growth,
                "passed": passed,
            }
        )
        numbers = (f"{time:.1f}", f"{sdpa:.1f}", f"{ratio:.1f}", f"{at_least:g}", f"{growth:.1f}")
        table.add_row(name, *numbers, "ok" if passed else "MISSED")
    Console(width=130).print(table)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "threads": options.threads, "system": platform.system()},
        "versions": {"farspan": farspan.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "rounds": options.rounds,
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
