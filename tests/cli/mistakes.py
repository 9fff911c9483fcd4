"""What can be broken in a folder before a command runs: files, and the disk itself."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint import filesystem

from farspan.data import _files

Mistake = Callable[[Path], object]


def write(name: str, content: str | bytes) -> Mistake:
    """Puts a file there."""

    def mistake(work: Path) -> None:
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return mistake


def remove(name: str) -> Mistake:
    """Deletes a file or a folder."""

    def mistake(work: Path) -> None:
        path = work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return mistake


def folder(name: str) -> Mistake:
    """Makes an empty folder."""
    return lambda work: (work / name).mkdir()


def cut(name: str, keep: int) -> Mistake:
    """Truncates a file: `keep` bytes stay, or all but -keep."""
    return lambda work: (work / name).write_bytes((work / name).read_bytes()[:keep])


def edit(name: str, old: str, new: str) -> Mistake:
    """Replaces text in a file."""

    def mistake(work: Path) -> None:
        text = (work / name).read_text()
        assert old in text
        (work / name).write_text(text.replace(old, new))

    return mistake


def poke(name: str, at: int, value: bytes) -> Mistake:
    """Overwrites bytes of a file."""

    def mistake(work: Path) -> None:
        content = bytearray((work / name).read_bytes())
        content[at : at + len(value)] = value
        (work / name).write_bytes(content)

    return mistake


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, syncing a file to disk fails as on a full one."""
    monkeypatch.setattr(_files.os, "fsync", _no_space)


def fill_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, there is room for everything but weights and optimiser."""
    monkeypatch.setattr(filesystem, "_write_item", _no_space)


def _no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(name: str, value: bytes) -> Mistake:
    """Overwrites every byte of a file."""
    return lambda work: (work / name).write_bytes(value * (work / name).stat().st_size)


def both(*mistakes: Mistake) -> Mistake:
    return lambda work: [mistake(work) for mistake in mistakes]
