"""Files of tensors: what one holds, told from its header, and one tensor at a time. No code in a file ever runs."""

import argparse
import math
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from farspan.errors import CheckpointError

# The names that safetensors has for types.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LFS_POINTER = b"version https://git-lfs"
# Where training programs put the parameters, and their own settings, in a file that holds more than parameters.
_STATES = ("model", "state_dict", "module")
_SETTINGS = ("args", "cfg", "config")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, known without reading it.

    Attributes:
        file: name of the file.
        shape: its shape.
        dtype: its type; the word of the file for one that torch or Farspan does not have.
    """

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Shard(Protocol):
    """One open file."""

    tensors: dict[str, Stored]
    settings: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """The tensor called `name`."""
        ...


def open_shard(path: Path) -> Shard:
    """Opens a file of tensors: safetensors by its suffix, anything else as a file of `torch.save`.

    Raises:
        CheckpointError: for a file that is cut off, damaged, or holds pickled code.
    """
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`.")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self.settings: dict[str, Any] = {}
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} ({size:,} bytes) is cut off or damaged: {str(error).rstrip('.')}. Fetch it again."
            ) from None
        self.tensors = {
            name: Stored(path.name, tuple(x.get_shape()), DTYPES.get(x.get_dtype(), x.get_dtype()))
            for name, x in slices.items()
        }

    def read(self, name: str) -> Tensor:
        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{name} in {self._path} cannot be read: {error}.") from None


class _Pickled:
    """A file of `torch.save`; the tensors stay on the disk until they are read, but for files of torch before 1.6."""

    def __init__(self, path: Path) -> None:
        self._state, self.settings = _split(_load(path), path)
        for name, x in self._state.items():
            if x.layout != torch.strided or x.is_quantized:
                raise CheckpointError(f"{name} in {path} is sparse or quantised; only plain tensors can be converted.")
        self.tensors = {name: Stored(path.name, tuple(x.shape), x.dtype) for name, x in self._state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name]


def _load(path: Path) -> Any:
    try:
        # Settings of fairseq stand in a Namespace, which holds values and does nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever reading a damaged file can run into
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds pickled code ({code[1]}), which would run if it were loaded; it is refused. If you "
                "trust its author, load it with torch yourself and save the state dict alone."
            ) from None
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is cut off, damaged, or no file of torch.save. Fetch it again."
        ) from error


def _split(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters, and the settings that stand beside them, if any."""
    settings: dict[str, Any] = {}
    if isinstance(content, dict) and not any(isinstance(x, Tensor) for x in content.values()):
        for name in _SETTINGS:
            value = content.get(name)
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            settings |= {str(key): x for key, x in value.items() if _plain(x)} if isinstance(value, dict) else {}
        content = next((content[name] for name in _STATES if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no state dict; expected a dict of tensors, or one called 'model' in it.")
    others = [str(name) for name, x in content.items() if not isinstance(name, str) or not isinstance(x, Tensor)]
    if others:
        raise CheckpointError(
            f"{path} holds other things than tensors ({', '.join(others[:5])}); expected a state dict, or one called "
            "'model'."
        )
    return {name: x.detach() for name, x in content.items()}, settings


def _plain(value: Any) -> bool:
    """Whether JSON has such values."""
    if isinstance(value, list):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)
