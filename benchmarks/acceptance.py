"""What the GPU benchmarks share: rows with limits, measured as `farspan bench ops` does, tables, the results file."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from farspan.evaluation.environment import gpus, versions
from farspan.evaluation.op_cases import CASES
from farspan.evaluation.op_speed import captured, ceilings, cold_first_call, interleaved, op_speed, steps

Checks = Callable[[], list[dict[str, Any]]]
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
CONSOLE = Console(width=170)
SMALLEST_ERROR = 1e-6  # of the largest entry: eight units of float32's last place, a few roundings of a sum
FIRST_CALL = 8.0  # seconds that a first forward and backward may take where no kernel is compiled


@dataclass(frozen=True)
class Row:
    """One operator at one shape, with what it may take.

    Attributes:
        case: its name in `farspan bench ops`.
        rows, tokens: the shape.
        most: the largest value of figures of `OpSpeed`.
        peer: the case that the following compare with, run in turns with it.
        slower: most times that forward + backward may take as long as the peer's.
        faster: least times that it is faster than the peer.
        leaner: least times that the peer needs its extra memory.
        cold: whether its first call is measured in a process that finds no compiled kernel.
    """

    case: str
    rows: int
    tokens: int
    most: dict[str, float] = field(default_factory=dict)
    peer: str | None = None
    slower: float | None = None
    faster: float | None = None
    leaner: float | None = None
    cold: bool = False


def measure(row: Row) -> dict[str, Any]:
    """The figures of a row, each limit with whether it is met."""
    found = dataclasses.asdict(op_speed(row.case, CASES[row.case], row.rows, row.tokens, BF16, CUDA))
    limits = [(name, found[name], "at most", limit) for name, limit in row.most.items()]
    if row.peer is not None:
        theirs = op_speed(row.peer, CASES[row.peer], row.rows, row.tokens, BF16, CUDA, repeats=5)
        found["peer"] = dataclasses.asdict(theirs)
        ratio = found["times_peer"] = None if theirs.note or found["note"] else _times(row)
        if row.slower is not None:
            limits.append(("times_peer", ratio, "at most", row.slower))
        if row.faster is not None:
            limits.append(("faster_than_peer", ratio and 1 / ratio, "at least", row.faster))
        if row.leaner is not None:
            less = theirs.extra_gib and found["extra_gib"] and theirs.extra_gib / found["extra_gib"]
            limits.append(("less_memory_than_peer", less, "at least", row.leaner))
    torch.cuda.empty_cache()
    return found | {"limits": [_limit(*limit) for limit in limits]}


def _limit(name: str, value: float | None, side: str, limit: float) -> dict[str, Any]:
    met = value is not None and (value <= limit if side == "at most" else value >= limit)
    return {"figure": name, "value": value, side.replace(" ", "_"): limit, "met": met}


def _times(row: Row) -> float:
    """Forward + backward over the peer's, replayed in turns."""
    assert row.peer is not None
    replays = []
    for name in (row.case, row.peer):
        _, both = steps(CASES[name].make(row.rows, row.tokens, BF16, CUDA))
        assert both is not None
        replays.append(captured(both))
    ours, theirs = interleaved(replays)
    return ours / theirs


def first_calls(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first call of every row that asks for it, one process after the other."""

    def first(row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {"operator": row.case, "rows": row.rows, "tokens": row.tokens}
        try:
            seconds = cold_first_call(row.case, row.rows, row.tokens, BF16, CUDA)
        except RuntimeError as error:
            return found | {"note": str(error), "limits": [_limit("first_call_s", None, "at most", FIRST_CALL)]}
        return found | {"limits": [_limit("first_call_s", seconds, "at most", FIRST_CALL)]}

    return [first(row) for row in rows if row.cold]


def errors_of(
    want: dict[str, torch.Tensor], runs: Sequence[dict[str, torch.Tensor]], plain: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], bool]:
    """Errors relative to the largest entry of each result, and whether they are within twice the same-dtype form's.

    Args:
        want: results in float64.
        runs: the kernels' results, run by run.
        plain: results of the PyTorch form of the same dtype.
    """
    errors, passed = {}, True
    for name, exact in want.items():
        largest = exact.abs().max().clamp(min=1e-30)
        ours, theirs = (float((y[name].double() - exact).abs().max() / largest) for y in (runs[0], plain))
        spread = max(float((run[name].double() - runs[0][name].double()).abs().max() / largest) for run in runs)
        errors[name] = {"kernel": ours, "same_dtype": theirs, "between_runs": spread}
        passed &= ours <= 2 * theirs + SMALLEST_ERROR and spread <= theirs + SMALLEST_ERROR
    return errors, passed


def run(out: str, about: str | None, checks: dict[str, Checks], rows: dict[str, list[Row]]) -> int:
    """Checks, measures, prints tables, writes the results.

    Args:
        out: where the results go unless `--out` says otherwise.
        about: what `--help` shows.
        checks: the precision checks by operator.
        rows: the times by operator.

    Returns:
        1 if a check or a limit failed.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help="where to write the results")
    ours = [name for name, group in rows.items() if CASES[group[0].case].peer_of is None]
    parser.add_argument("--only", nargs="+", choices=list(rows), default=ours, help="these operators alone")
    parser.add_argument("--times", action="store_true", help="times alone")
    parser.add_argument("--warm", action="store_true", help="without the first calls in processes of their own")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU")
    only = [] if options.only == ours else ["--only", *options.only]
    switches = [f"--{name}" for name in ("times", "warm") if getattr(options, name)]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *only, *switches])
    wanted = [row for name in options.only for row in rows[name]]
    first = [] if options.warm else first_calls(wanted)
    times = [measure(row) for row in wanted]
    show(times + first)
    found = [] if options.times else [entry for name in options.only for entry in checks.get(name, list)()]
    show_checks(found)
    report = {
        "command": command,
        "device": gpus()[0],
        "versions": versions() | {"cudnn": torch.backends.cudnn.version()},
        "ceilings": ceilings(CUDA, BF16),
        "times": times,
        "first_calls": first,
        "precision": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    missed = [limit for entry in times + first for limit in entry["limits"] if not limit["met"]]
    return 1 if missed or not all(check["passed"] for check in found) else 0


def show_checks(checks: list[dict[str, Any]]) -> None:
    """Prints the table of errors."""
    table = Table("operator", "case", "worst ratio", "kernel's largest error", "between runs", "")
    for c in checks:
        worst = max((e["kernel"], name) for name, e in c["errors"].items())
        ratio = max(e["kernel"] / max(e["same_dtype"], 1e-7) for e in c["errors"].values())
        spread = max(e["between_runs"] for e in c["errors"].values())
        shown = (f"{ratio:.2f}", f"{worst[0]:.1e} {worst[1]}", f"{spread:.1e}", "ok" if c["passed"] else "OFF")
        table.add_row(c["operator"], c["case"], *shown)
    CONSOLE.print(table)


def show(times: list[dict[str, Any]]) -> None:
    """Prints the table of times."""
    columns = ("forward_ms", "both_ms", "eager_ms", "extra_gib", "launches")
    table = Table("operator", "shape", *columns, "limits", "")
    for t in times:
        numbers = (f"{t[name]:.4g}" if t.get(name) is not None else "" for name in columns)
        limits = [
            f"{limit['figure']} {'?' if limit['value'] is None else format(limit['value'], '.4g')}"
            f" ({limit.get('at_most', limit.get('at_least'))})"
            for limit in t["limits"]
        ]
        met = "ok" if all(limit["met"] for limit in t["limits"]) else "MISSED"
        table.add_row(t["operator"], f"{t['rows']}x{t['tokens']}", *numbers, ", ".join(limits) + t.get("note", ""), met)
    CONSOLE.print(table)
