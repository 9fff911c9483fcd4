"""What a run tells: metrics.jsonl for programs, TensorBoard for curves, a live bar or plain lines for people."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from farspan.errors import CheckpointError

# Dense bfloat16 peaks of the makers' data sheets, FLOP/s. A device that is not here gets no utilisation figure, because
# a guessed peak makes a wrong one.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Peak FLOP/s of `device` in bfloat16, or None where it is not known."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in _PEAKS.items() if name in words), None)


class MetricsLog:
    """Appends rows to metrics.jsonl; a resumed run first cuts off what came after its checkpoint.

    Every row has `kind` ("train", "evaluation" or "final") and `step`. A row is in the hands of the operating system
    when `write` returns, so killing the process loses none.

    Args:
        path: The file.
        after_step: Rows of later steps are removed, as are a final row, which is written after the last checkpoint, and
            a last line that was cut short; 0 empties the file.

    Attributes:
        missing: How many of the steps up to `after_step` have no row, because the file was deleted or shortened.

    Raises:
        CheckpointError: The file is damaged; it is left as it is.
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(path) if after_step else []
        kept = [row for row in rows if row["step"] <= after_step and row["kind"] != "final"]
        self.missing = after_step - len({row["step"] for row in kept if row["kind"] == "train"})
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that was cut short; an absent file has none.

    Raises:
        CheckpointError: A line is damaged; the message gives its number.
    """
    rows: list[dict[str, Any]] = []
    if path.is_file():
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row["kind"], str) or not isinstance(row["step"], int):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                if number == len(lines):
                    break  # the process died while writing it
                raise CheckpointError(
                    f"{path}, line {number} is damaged. Mend the line, or delete the file: training goes on without "
                    "it, and the report shows the steps from then on."
                ) from None
            rows.append(row)
    return rows


class TensorBoard:
    """Scalars for TensorBoard.

    Args:
        directory: Where the events go; None writes nothing.
        after_step: Points of later steps, written before a crash, are hidden.
    """

    def __init__(self, directory: Path | None, after_step: int = 0) -> None:
        self._writer: Any = None
        if directory is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory), purge_step=after_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Writes every number of a row of metrics.jsonl as `kind/name`."""
        if self._writer is not None:
            for name, value in row.items():
                if name not in ("kind", "step") and isinstance(value, int | float):
                    self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        """Writes out what is buffered."""
        if self._writer is not None:
            self._writer.close()


class Display:
    """Shows a run on a console: one live bar on a terminal, a plain line now and then elsewhere.

    Args:
        mode: "live", "plain", "none", or "auto" for live on a terminal and plain otherwise.
        every: Steps between plain lines.
        console: Where to print; standard output by default.
    """

    def __init__(
        self, mode: Literal["auto", "live", "plain", "none"], every: int, console: Console | None = None
    ) -> None:
        self.console = console or Console(soft_wrap=True, quiet=mode == "none")
        self.live = mode == "live" or (mode == "auto" and self.console.is_terminal)
        self.every = every
        self.total = 0
        self._speeds: dict[str, float] = {}
        self._task = TaskID(0)
        self._progress: Progress | None = None

    def start(self, total: int, done: int) -> None:
        """Begins to show steps `done` to `total`."""
        self.total = total
        if self.live:
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[m]}"),
            )
            self._progress = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=self.console)
            self._task = self._progress.add_task("training", total=total, completed=done, m="")
            self._progress.start()

    def step(self, row: dict[str, Any], seconds_left: float) -> None:
        """Shows a row of kind "train", its speeds as moving averages so that they can be read."""
        row = dict(row)
        for name in ("tokens_per_second", "flops_per_second", "mfu"):
            if name in row:
                row[name] = self._speeds[name] = 0.9 * self._speeds.get(name, row[name]) + 0.1 * row[name]
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], m=_summary(row))
        elif row["step"] % self.every == 0 or row["step"] in (1, self.total):
            self.message(f"step {row['step']:>6}/{self.total}  {_summary(row)}  left {duration(seconds_left)}")

    def message(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        self.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Takes the bar down and leaves its last state."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _summary(row: dict[str, Any]) -> str:
    """Loss and speed of one step, for people."""
    parts = [
        f"loss {row['loss']:.4f}",
        quantity(row["tokens_per_second"], "tok/s"),
        quantity(row["flops_per_second"], "FLOP/s"),
    ]
    return "  ".join([*parts, f"MFU {row['mfu']:.1%}"] if "mfu" in row else parts)


def quantity(value: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 12345 is "12.3k", with a unit "12.3 ktok/s"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g}{' ' if unit else ''}{prefixes[0]}{unit}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
