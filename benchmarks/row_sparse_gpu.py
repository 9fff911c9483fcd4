"""Measures optimiser steps of a million experts on a GPU: AdamW, and AdamW by rows, with the share of rows touched.

    python benchmarks/row_sparse_gpu.py                    # docs/results/row_sparse_gpu.json
    python benchmarks/row_sparse_gpu.py --experts 262144 --width 2048

Both step the same table in turns; the rows that 8,192 tokens have chosen, 64 each, have a gradient: chosen evenly, or
few rows by many tokens.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farspan.evaluation.environment import gpus, versions
from farspan.evaluation.op_speed import interleaved
from farspan.training.row_sparse import RowSparseAdamW

CHOICES = 8192 * 64


def measure(experts: int, width: int, skew: float) -> dict[str, Any]:
    """One table; a chosen expert's number is `experts · uᵏ` with u uniform and k the skew."""
    torch.manual_seed(0)
    touched = (torch.rand(CHOICES, device="cuda") ** skew * experts).long().clamp(max=experts - 1).unique()
    table = nn.Parameter(torch.randn(experts, width, device="cuda"))
    table.grad = torch.zeros_like(table)
    table.grad[touched] = torch.randn(len(touched), width, device="cuda")
    dense = torch.optim.AdamW([table], fused=True)
    by_rows = RowSparseAdamW([{"params": [table], "row_sparse": True}])
    dense_ms, rows_ms = interleaved([dense.step, by_rows.step])
    moved = 4 * width * (experts + 6 * len(touched))  # every gradient; p, m and v of touched rows read and written
    return {
        "experts": experts,
        "width": width,
        "touched": round(len(touched) / experts, 4),
        "adamw_ms": round(dense_ms, 3),
        "row_sparse_ms": round(rows_ms, 3),
        "row_sparse_gigabytes_per_second": round(moved / rows_ms / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("docs/results/row_sparse_gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU")
    cases = [measure(options.experts, options.width, skew) for skew in (1, 8, 64)]
    for case in cases:
        print(" ".join(f"{name}={value}" for name, value in case.items()), flush=True)
    command = " ".join(["python benchmarks/row_sparse_gpu.py", *sys.argv[1:]])
    found = {"command": command, "device": gpus()[0]["name"], "versions": versions(), "cases": cases}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
