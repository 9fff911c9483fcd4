"""A checkpoint on disk: its configuration, what its files hold, and one tensor at a time with one file open."""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from farspan.errors import CheckpointError
from farspan.models.convert.shards import Shard, Stored, open_shard

_STANDARD = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Files of torch that training programs leave beside the weights.
_OTHER_FILES = ("optimizer", "scheduler", "scaler", "training_args", "rng_state")


class Source:
    """A directory with config.json and weights, or one file of weights with the config.json beside it.

    Reading it checks that files and index agree; of the tensors only names, shapes and types are read.

    Args:
        path: the directory or the file.

    Attributes:
        directory: where tokenizer and configuration are looked for.
        config: the configuration; empty if there is none.
        config_from: what it was read from; None if there is none.
        tensors: name → what is known of it, file by file.

    Raises:
        CheckpointError: naming what is missing, damaged, cut off or not to be trusted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(f"{self.path} does not exist; give the directory or the file of a checkpoint.")
        self.directory = self.path if self.path.is_dir() else self.path.parent
        config = read_json(self.directory / "config.json")
        self.config, self.config_from = config or {}, None if config is None else "config.json"
        files, listed = _files(self.path) if self.path.is_dir() else ([self.path.name], None)
        self._open: tuple[str, Shard] | None = None
        self.tensors: dict[str, Stored] = {}
        for file in files:
            shard = self._shard(file)
            if listed is not None:
                _check_listed(self.directory / file, shard, {name for name, home in listed.items() if home == file})
            self.tensors |= {name: replace(x, file=file) for name, x in shard.tensors.items()}
            if shard.settings and self.config_from is None:
                self.config, self.config_from = dict(shard.settings), f"the settings in {file}"
        if not self.tensors:
            raise CheckpointError(f"{self.path} holds no tensors.")
        self.close()

    def read(self, name: str) -> Tensor:
        """The tensor called `name`. The file that held the one before is closed if it is another."""
        return self._shard(self.tensors[name].file).read(name)

    def close(self) -> None:
        """Closes the file that is open."""
        self._open = None

    def _shard(self, name: str) -> Shard:
        if self._open is None or self._open[0] != name:
            self._open = None  # before the next is opened: pages of a mapped file count as memory until then
            self._open = (name, open_shard(self.directory / name))
        return self._open[1]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file.

    Raises:
        CheckpointError: if it is damaged, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object.")
    return content


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files that hold the weights, and, where there is an index, tensor → file."""
    for name in _STANDARD:
        if (directory / name).is_file():
            return [name], None
        if (directory / f"{name}.index.json").is_file():
            return _indexed(directory / f"{name}.index.json")
    found = sorted(
        path.name for path in directory.iterdir() if path.suffix in _SUFFIXES and not path.name.startswith(_OTHER_FILES)
    )
    if len(found) == 1:
        return found, None
    accepted = f"{' or '.join(_STANDARD)}, the index of either, or a single file ({', '.join(_SUFFIXES)})"
    if found:
        raise CheckpointError(
            f"{directory} has {len(found)} files that may be the weights ({some(found)}), and no "
            f"index; expected {accepted}. Name one of the files, or put the index there."
        )
    raise CheckpointError(f"{directory} has no weights; expected {accepted}.")


def _indexed(index: Path) -> tuple[list[str], dict[str, str]]:
    listed = (read_json(index) or {}).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index} is damaged: it has no weight_map from tensors to files.")
    names = sorted(set(listed.values()))
    for name in names:
        if os.path.isabs(name) or os.path.normpath(name) != name or name.startswith("..") or "\\" in name:
            raise CheckpointError(f"{index} points to {name!r}, outside of its directory or not a plain name: refused.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} is incomplete: {len(missing)} of {len(names)} files that {index.name} lists are missing "
            f"({some(missing)})."
        )
    return names, listed


def _check_listed(file: Path, shard: Shard, listed: set[str]) -> None:
    """A file must hold what the index says, no less and no more."""
    missing, extra = sorted(listed - set(shard.tensors)), sorted(set(shard.tensors) - listed)
    if missing or extra:
        raise CheckpointError(
            f"{file} and its index do not agree: "
            + "; ".join(
                f"{len(found)} tensors {what} ({some(found)})"
                for found, what in ((missing, "are missing in the file"), (extra, "are not in the index"))
                if found
            )
            + "."
        )
