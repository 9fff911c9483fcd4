"""Writing files so that a reader never meets half of one."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from farspan.errors import DataError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block into a `DataError` about writing `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"the disk is full: {path} could not be written. Nothing incomplete was left under its name; "
                "free some space and run the same command again."
            ) from error
        raise DataError(f"cannot write {path}: {error.strerror or error}.") from error


def partial(path: Path) -> Path:
    """The name under which `path` is written until it is whole."""
    return path.with_name(path.name + ".partial")


def publish(path: Path) -> None:
    """Gives the finished `partial(path)` its name, atomically; its content must have been synced to disk."""
    os.replace(partial(path), path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file atomically: temporary name, sync to disk, rename."""
    with writing(path), partial(path).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    with writing(path):
        publish(path)


def sync_directory(path: Path) -> None:
    """Makes the renames inside `path` durable, where the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
