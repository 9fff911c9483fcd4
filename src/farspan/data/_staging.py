"""The directory in which a dataset is built before it gets its name: one process at a time, all or nothing."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from farspan.data import _files
from farspan.data.dataset import METADATA
from farspan.errors import DataError

_INPUTS = "inputs.json"


@contextlib.contextmanager
def locked(destination: Path) -> Iterator[Path]:
    """Makes the staging directory and holds it for this process; the hold ends with the process, however that ends."""
    staging = destination.with_name(f".{destination.name}.preparing")
    with _files.writing(staging):
        staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY)
    try:
        _lock(descriptor, staging)
        try:
            yield staging
        finally:
            if not any(staging.glob("*.idx")):
                shutil.rmtree(staging, ignore_errors=True)  # nothing in it that a later run could use
    finally:
        os.close(descriptor)


def _lock(descriptor: int, staging: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is preparing this dataset now (it holds {staging}); wait for it.") from None


def discard_other_work(staging: Path, inputs: dict[str, object]) -> None:
    """Empties the staging directory unless what is in it was made from the same `inputs`."""
    record = staging / _INPUTS
    content = json.dumps(inputs, indent=2).encode()
    if record.is_file() and record.read_bytes() == content:
        return
    for path in staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    _files.write_bytes(record, content)


def install(staging: Path, destination: Path) -> None:
    """Gives the finished directory its name; a dataset that was there is removed afterwards."""
    old = _replaced(destination)
    if (destination / METADATA).exists():
        os.replace(destination, old)
    os.replace(staging, destination)
    (destination / _INPUTS).unlink(missing_ok=True)
    _files.sync_directory(destination.parent)
    shutil.rmtree(old, ignore_errors=True)


def interrupted(destination: Path) -> bool:
    """Whether an `install` was stopped before its end."""
    return _replaced(destination).exists()


def restore(destination: Path) -> None:
    """Undoes an `install` that was stopped between its two renames, or finishes one that was stopped after them."""
    old = _replaced(destination)
    if not old.exists():
        return
    if destination.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(old, destination)


def _replaced(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.replaced")
