"""Converting a checkpoint, in either direction."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from farspan.errors import CheckpointError, nearest
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.plan import FLOATS, Plan, word
from farspan.models.convert.plan_in import plan_in
from farspan.models.convert.plan_out import RECORD, differences, load_config, plan_out
from farspan.models.convert.source import Source, read_json, some
from farspan.models.convert.writer import ShardWriter, check_destination, staged, write_json

Direction = Literal["farspan", "original"]
# What goes along: tokenizers, settings of generation and of image processing, licences. Never code, never pickles.
_TRAVELLING = (
    "tokenizer*.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
)
_PICKLES = (b"\x80", b"PK\x03\x04")


@dataclass(frozen=True)
class Conversion:
    """What was converted, or would be.

    Attributes:
        to: `farspan` or `original`.
        family, title: the published family.
        architecture: the class that loads the destination.
        source: what was read.
        destination: where it was written; None for a dry run.
        config_from: what the source's configuration was read from; None if it has none.
        published: the published configuration.
        config: Farspan's configuration.
        rows: the map: published name, published shape, our names.
        derived: published buffers that follow from the configuration.
        copies: published tensors that repeat another.
        ignored: published buffers that mean nothing.
        assumed: settings that the source does not hold → the values taken.
        unread: settings of the source that change nothing.
        notes: what the user should know, traps first.
        files: other files that go along.
        dtype: type of most parameters.
        tensors, parameters, bytes: how many are written; `parameters` counts a tied head once.
        seconds: how long it took.
    """

    to: Direction
    family: str
    title: str
    architecture: str
    source: str
    destination: str | None
    config_from: str | None
    published: dict[str, Any]
    config: dict[str, Any]
    rows: list[tuple[str, tuple[int, ...], tuple[str, ...]]]
    derived: list[str]
    copies: list[str]
    ignored: list[str]
    assumed: dict[str, Any]
    unread: list[str]
    notes: list[str]
    files: list[str]
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def convert(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    to: Direction = "farspan",
    family: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Converts a published checkpoint to a directory that Farspan loads, or back.

    Tensors are read, converted and written one at a time, with one file of the source open; pickled code never runs.
    The destination appears when it is complete, or not at all. Tokenizer and generation settings go along. The way back
    writes every parameter as it was, to the bit, and the published configuration with all its keys.

    Args:
        source: a directory with config.json and weights (`model.safetensors`, `pytorch_model.bin`, the index of either,
            or a single other file), or one file of weights.
        destination: the directory to make; not needed for a dry run.
        to: `farspan`, or `original` for the way back.
        family: the published family; None tells it from the checkpoint, or, on the way back, from its record.
        dtype: type of the written parameters; None keeps the type of each.
        max_shard_size: bytes per file, or a text such as `5GB`.
        overwrite: whether a model directory at the destination is replaced.
        dry_run: whether to plan alone, and write nothing.
        progress: called with the number of tensors written so far and in all.

    Returns:
        What was done, or would be.

    Raises:
        CheckpointError: if the checkpoint is of no known family, not whole, not what its configuration says, or not to
            be trusted; if the destination is taken.

    Cost:
        Time of reading and writing every byte once; memory of one file of the source that is mapped, and of one tensor.
    """
    start = time.perf_counter()
    if to not in ("farspan", "original"):
        raise CheckpointError(f"to={to!r} is no direction: {nearest(str(to), ('farspan', 'original'))}")
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"dtype={word(dtype)} is not accepted; choose float16, bfloat16, float32 or float64.")
    opened = Source(source)
    target = None
    if not dry_run:
        if destination is None:
            raise CheckpointError("There is no destination; name a directory, or ask for a dry run.")
        target = Path(destination)
        check_destination(opened.path, target, overwrite)
    plan = (plan_in if to == "farspan" else plan_out)(opened, family)
    plan.cast(dtype)
    files = travelling(opened.directory)
    if target is not None:
        _write(plan, target, files, max_shard_size, progress)
    opened.close()
    config = plan.config
    return Conversion(
        to=to,
        family=plan.family.name,
        title=plan.family.title,
        architecture=(config.architectures or ["FarspanForCausalLM"])[0]
        if to == "farspan"
        else (plan.published.get("architectures") or [plan.family.title])[0],
        source=str(opened.path),
        destination=None if target is None else str(target),
        config_from=opened.config_from,
        published=plan.published,
        config=config.to_diff_dict(),
        rows=plan.rows,
        derived=plan.derived,
        copies=plan.copies,
        ignored=plan.ignored,
        assumed=plan.assumed,
        unread=plan.unread,
        notes=[*plan.notes, *(_left_behind(opened.directory, files) if plan.inward else [])],
        files=[path.name for path in files],
        dtype=word(plan.dtype),
        tensors=len(plan.outputs),
        parameters=plan.parameters,
        bytes=sum(x.nbytes for x in plan.outputs.values()),
        seconds=time.perf_counter() - start,
    )


def travelling(directory: Path) -> list[Path]:
    """The files that go along with the weights."""
    found = {path for pattern in _TRAVELLING for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not _is_pickle(path))


def _left_behind(directory: Path, files: list[Path]) -> Iterator[str]:
    code = sorted(path.name for path in directory.glob("*.py"))
    if code:
        yield f"Code is not taken along, and Farspan needs none of it: {some(code)}."
    names = {path.name for path in files}
    if "auto_map" in (read_json(directory / "tokenizer_config.json") or {}) and "tokenizer.json" not in names:
        yield "The tokenizer is code of its own, which does not go along; put another tokenizer into the directory."


def _write(
    plan: Plan, target: Path, files: list[Path], max_shard_size: int | str, progress: Callable[[int, int], None] | None
) -> None:
    with staged(target, sum(x.nbytes for x in plan.outputs.values())) as staging:
        for path in files:
            shutil.copyfile(path, staging / path.name)
        write_json(staging / "config.json", plan.config.to_diff_dict() if plan.inward else plan.published)
        if plan.record:
            write_json(staging / RECORD, plan.record)
        writer, done = ShardWriter(staging, plan.outputs, max_shard_size), 0
        try:
            for step in plan.steps:
                made = step.work([plan.source.read(name) for name in step.reads])
                for name, x in made.items():
                    writer.write(name, _cast(name, x, plan.outputs[name].dtype))
                    done += 1
                    if progress is not None:
                        progress(done, len(plan.outputs))
        finally:
            writer.close()
        _verify(plan, staging)


def _cast(name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.dtype == dtype:
        return x
    narrow = x.to(dtype)
    if not narrow.isfinite().all() and x.isfinite().all():
        raise CheckpointError(f"{name} has values that {word(dtype)} cannot hold; choose another type.")
    return narrow


def _verify(plan: Plan, staging: Path) -> None:
    """Reads back what was written and holds it against the plan.

    Raises:
        CheckpointError: if it is anything else.
    """
    written = Source(staging)
    found = {name: (x.shape, x.dtype) for name, x in written.tensors.items()}
    if found != {name: (tuple(x.shape), x.dtype) for name, x in plan.outputs.items()}:
        raise CheckpointError(f"What was written to {staging} is not what was planned; is the disk damaged?")
    if plan.inward:
        parameters = sum(x.elements for x in written.tensors.values())
        if parameters != plan.parameters or differences(load_config(written), plan.config):
            raise CheckpointError(
                f"What was written has {parameters:,} parameters, the model {plan.parameters:,}; or its config.json "
                f"does not say the same as {FarspanConfig.__name__}."
            )


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(_PICKLES)
