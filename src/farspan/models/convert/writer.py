"""Writing a model directory: streamed, in shards as transformers names them, and complete or not there at all."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from farspan.errors import CheckpointError
from farspan.models.convert.shards import DTYPES

_PATTERN = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


class ShardWriter:
    """Writes safetensors files whose tensors are known beforehand and come one at a time, in any order.

    Args:
        directory: an existing directory.
        tensors: name → tensor of the meta device: all that will be written, in the order of the shards.
        max_shard_size: bytes per file, or a text such as `5GB`; a larger tensor has a file for itself.

    Raises:
        CheckpointError: for a size that is none.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> None:
        try:
            split = split_state_dict_into_shards_factory(
                dict(tensors),
                get_storage_size=lambda x: x.nbytes,
                filename_pattern=_PATTERN,
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise CheckpointError(
                f"max_shard_size={max_shard_size!r} is no size: {error}; e.g. 500MB or 5GB."
            ) from None
        self.bytes = sum(x.nbytes for x in tensors.values())
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._expected = dict(tensors)
        for file, names in split.filename_to_tensors.items():
            self._begin(directory / file, {name: tensors[name] for name in names})
        if len(self._files) > 1:
            parameters = sum(x.numel() for x in tensors.values())
            index = {
                "metadata": {"total_size": self.bytes, "total_parameters": parameters},
                "weight_map": dict(sorted(split.tensor_to_filename.items())),
            }
            write_json(directory / INDEX, index)

    def write(self, name: str, x: Tensor) -> None:
        """Writes one tensor to its place."""
        expected = self._expected.pop(name)
        assert x.shape == expected.shape and x.dtype == expected.dtype, (name, x.shape, x.dtype)
        file, start = self._places[name]
        file.seek(start)
        file.write(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Ends the files; with all tensors written they are on the disk afterwards, and none is missing."""
        for file in self._files.values():
            with file:
                if not self._expected:
                    file.flush()
                    os.fsync(file.fileno())

    def _begin(self, path: Path, tensors: dict[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        # In the library's order, wide types first: every tensor then stands at a multiple of its element's size.
        for name, x in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            places[name] = end
            header[name] = {"dtype": _WORDS[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
            end += x.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        self._files[path.name] = file
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        self._places |= {name: (file, 8 + len(text) + start) for name, start in places.items()}


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file, down to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuses a destination that is taken.

    Raises:
        CheckpointError: for one that exists and may not or must not be replaced.
    """
    ours, theirs = destination.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise CheckpointError(
            f"{destination} is, holds, or lies in the checkpoint {source} itself; choose another place."
        )
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not (destination / "config.json").is_file():
        raise CheckpointError(
            f"{destination} exists and is no model directory; it is left alone. Choose another place."
        )
    if not overwrite:
        raise CheckpointError(f"{destination} exists; choose another place, or replace it with --overwrite.")


@contextlib.contextmanager
def staged(destination: Path, size: int) -> Iterator[Path]:
    """A directory beside `destination` that takes its place, replacing what is there, when the block ends well.

    If the block fails or is interrupted it is deleted; what a killed process left is cleared away by the next.

    Args:
        destination: a place that `check_destination` has accepted.
        size: bytes that will be written, at least.

    Raises:
        CheckpointError: if there is no room, or another process is writing the same destination.
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(destination.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size:,} bytes are needed and {free:,} are free", str(destination))
    staging = destination.with_name(f".{destination.name}.converting")
    staging.mkdir(exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is writing {destination} now (it holds {staging}).") from None
        old = _replaced(destination)
        if old.exists() and not destination.exists():
            os.replace(old, destination)  # a process was killed between its two renames
        try:
            _clear(staging)
            yield staging
            os.fsync(descriptor)
            _install(staging, destination)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # gone already if all went well
    finally:
        os.close(descriptor)


def _install(staging: Path, destination: Path) -> None:
    old = _replaced(destination)
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        os.replace(destination, old)
    try:
        os.replace(staging, destination)
    except BaseException:
        if old.exists():
            os.replace(old, destination)
        raise
    parent = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


def _replaced(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.replaced")


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
