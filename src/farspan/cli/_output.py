"""What every command prints with: one console for results, one for messages, and one form of an error."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

out = Console()
err = Console(stderr=True)


def message(text: str, *, label: str = "", style: str = "bold red") -> None:
    """Prints one line of text on stderr, never wrapped and never read as markup, after an optional coloured label."""
    line = Text(f"{label}: " if label else "", style=style)
    err.print(line.append(text, style="default not bold"), soft_wrap=True, highlight=False)


def fail(text: str) -> int:
    """Prints an error on stderr and returns the exit code of a mistake that the user can mend, 2."""
    message(text, label="error")
    return 2


def describe_os_error(error: OSError) -> str:
    """Names the file and the reason of an `OSError` in one line, and what to do where that is known."""
    hints = {
        "ENOSPC": "free some space or write to another disk, then run the same command again",
        "EDQUOT": "free some of the quota or write to another disk, then run the same command again",
        "EACCES": "choose a place that you may read and write",
        "EROFS": "choose a place that you may write",
    }
    name = errno.errorcode.get(error.errno or 0, "")
    names = [str(part) for part in (error.filename, error.filename2) if part is not None]
    text = f"{' -> '.join(names)}: {error.strerror or error}" if names else str(error.strerror or error)
    return f"{text}; {hints[name]}." if name in hints else text


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on stderr that leaves nothing behind; silent where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as display:
        yield display


def tolerate_encoding() -> None:
    """Lets stdout replace what its encoding lacks, instead of failing on a table or a text from a model."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def silence_broken_pipe() -> None:
    """Points stdout at the null device, so that the interpreter's last flush does not complain about a closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refresh_report(directory: Path) -> Path | None:
    """Writes the report of a run anew, with what was just measured or sampled; None when `directory` is no run."""
    if not (directory / "recipe.yaml").is_file():
        return None
    from farspan.training.report import write_report

    return write_report(directory)


def figures(*names: str, numbers: Sequence[str], title: str | None = None) -> Table:
    """An empty table whose numbers are never cut: on a narrow terminal the names beside them are broken."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
