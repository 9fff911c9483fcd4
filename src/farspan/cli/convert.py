"""`farspan convert`: a published checkpoint becomes a Farspan model, or one goes back to its published form."""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from farspan.cli import _output
from farspan.errors import ConfigError

if TYPE_CHECKING:
    from farspan.models.convert import Conversion

_DESCRIPTION = """Convert a published checkpoint into a Farspan model directory, or back.

    farspan convert downloads/doge-60m models/doge-60m --dry-run
    farspan convert downloads/doge-60m models/doge-60m
    farspan convert models/doge-60m exported --to original

SRC is a directory with config.json and weights: model.safetensors or pytorch_model.bin, in shards or not, or one file
of another name; it may also be such a file itself. The family (CoCA, Cottention, Doge, Cheems, MetaLA, LongNet,
LongViT, GigaPath, LLaMA, Qwen3, GPT-NeoX, GPT-J, BERT) is told from the tensors, since many of these checkpoints claim
to be stock models; a dry run shows what was found and where every tensor goes. Pickled code is refused, never run.

DST appears when it is complete, or not at all. Types are kept, tokenizer and generation settings go along. DST
remembers what it was converted from: the way back gives every parameter to the bit, also after further training."""


@dataclass(kw_only=True)
class _Command:
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """The checkpoint: a directory, or one file of weights with its config.json beside it."""
    destination: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[DST]")] = None
    """The directory to make; not needed with --dry-run."""
    to: Literal["farspan", "original"] = "farspan"
    """original is the way back: SRC is a Farspan model, DST gets published names and config.json."""
    family: str | None = None
    """The published family, where the checkpoint leaves it open, or on the way back of a model trained with Farspan.
    An unknown name lists them all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of the written parameters; auto keeps the type of each."""
    max_shard_size: str = "5GB"
    """Size of a file of weights at most, such as 500MB."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a model directory at DST, in one step at the end."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show family, configuration and the map of names, and write nothing."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print what was done, or would be, as JSON with every tensor in it."""


def run(argv: list[str]) -> int:
    """Runs `farspan convert`.

    Args:
        argv: The arguments after `convert`.

    Returns:
        0 when the destination is there, or the dry run shown.

    Raises:
        FarspanError: What the user can mend.
        SystemExit: From the argument parser, after it has printed help (0) or a message (2).
    """
    options = tyro.cli(_Command, args=argv, prog="farspan convert", description=_DESCRIPTION)
    if options.destination is None and not options.dry_run:
        raise ConfigError("farspan convert needs DST, the directory to make; or --dry-run, which makes none.")

    import torch

    from farspan.models.convert import convert

    with _tensors() as progress:
        done = convert(
            options.source,
            options.destination,
            to=options.to,
            family=options.family,
            dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
            progress=progress,
        )
    if options.json:
        print(json.dumps(done.to_dict(), indent=2))
        return 0
    if options.dry_run:
        _show_plan(done)
    for note in done.notes:
        _output.message(note, label="note", style="bold yellow")
    _show_summary(done)
    return 0


def collapsed(rows: Sequence[tuple[str, Sequence[int], Sequence[str]]]) -> list[tuple[str, str, str]]:
    """The map with one line for what all layers share: `h.{0–11}.attn.weight`.

    Args:
        rows: published name, published shape, our names.

    Returns:
        The same as text, in the order of the first of each line.
    """
    found: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for published, shape, ours in rows:
        names = ", ".join(ours)
        key = (_pattern(published), " × ".join(map(str, shape)) or "scalar", _pattern(names))
        found.setdefault(key, []).append((_index(published), _index(names)))
    return [
        (published.replace("#", _range(theirs)), shape, ours.replace("#", _range(mine)))
        for (published, shape, ours), numbers in found.items()
        for theirs, mine in [tuple(zip(*numbers, strict=True))]
    ]


def _pattern(name: str) -> str:
    """A name with its layer's number replaced."""
    index = _index(name)
    return re.sub(rf"(?<![^.]){index}(?=\.)", "#", name) if index else name


def _index(name: str) -> str:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return found[1] if found else ""


def _range(numbers: Sequence[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"{{{numbers[0]}–{numbers[-1]}}}"


@contextmanager
def _tensors() -> Iterator[Callable[[int, int], None]]:
    with _output.progress() as display:
        task = display.add_task("tensors", total=None)
        yield lambda done, total: display.update(task, completed=done, total=total)


def _show_plan(done: "Conversion") -> None:
    _rows({"family": f"{done.title} (--family {done.family})", "class": done.architecture})
    _section("config.json as read" if done.to == "farspan" else "config.json to write", json.dumps(done.published))
    _section("config.json of Farspan", json.dumps(done.config))
    lines = [("published", "shape", "Farspan"), *collapsed(done.rows)]
    wide = [max(len(line[column]) for line in lines) for column in range(3)]
    for number, line in enumerate(lines):
        text = "  ".join(part.ljust(width) for part, width in zip(line, wide, strict=True)).rstrip()
        _output.out.print(text, style="" if number else "bold", markup=False, highlight=False, soft_wrap=True)
    for title, names in (
        ("derived from the configuration", done.derived),
        ("copies of another tensor", done.copies),
        ("ignored: mean nothing", done.ignored),
        ("settings that change nothing", done.unread),
        ("assumed settings", [f"{name}={value!r}" for name, value in done.assumed.items()]),
        ("files that go along", done.files),
    ):
        if names:
            _section(title, ", ".join(names))


def _show_summary(done: "Conversion") -> None:
    rows = {
        "family": f"{done.title}, as {done.architecture}",
        "tensors": f"{done.tensors:,}, {done.parameters:,} parameters, {done.bytes:,} bytes, {done.dtype}",
        "time": f"{done.seconds:.1f} s",
    }
    if done.destination is None:
        rows["written"] = "nothing (dry run)"
    else:
        rows["written"] = done.destination
        if done.to == "farspan":
            rows["next"] = next_command(done)
    _rows(rows)


def next_command(done: "Conversion") -> str:
    """What to do with a converted model."""
    assert done.destination is not None
    where = shlex.quote(done.destination)
    tokenizer = any(name.startswith("tokenizer") for name in done.files)
    if done.architecture == "FarspanForCausalLM" and tokenizer:
        return f"farspan generate {where} 'Once upon a time'"
    return f"farspan info {where}"


def _section(title: str, text: str) -> None:
    _output.out.print(title, style="bold", markup=False, highlight=False)
    _output.out.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)


def _rows(rows: dict[str, str]) -> None:
    for name, text in rows.items():
        _output.out.print(f"{name:<8} {text}", markup=False, highlight=False, soft_wrap=True)
