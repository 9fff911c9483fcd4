"""Block sizes of kernels: those that the library ships, and those that `farspan bench ops --tune` measured on a card.

An operator asks `measured` for the tile of a kernel when it first needs it; nothing is timed then. The answer is the
one that a table of this card names, otherwise the shipped one. The table is the file that the environment variable
`FARSPAN_TILES` names, otherwise `farspan/tiles/<name of the card>.json` in `$XDG_CACHE_HOME` or `~/.cache`:

    {"format": 1, "device": "NVIDIA H200", "tiles": {"gated_linear.output 64 2": [128, 4, 1, 128]}}
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch

from farspan.errors import ConfigError

# Columns of a block, warps, stages, most registers of a thread; or whatever else an operator's kernel takes.
Tile = tuple[int | None, ...]
T = TypeVar("T", bound=Tile)
FORMAT = 1

_MEND = "Measure again with 'farspan bench ops --tune', or delete the file."
_candidates: dict[str, set[Tile]] = {}
_trial: dict[str, Tile] = {}
_asked: dict[str, Tile] = {}
_forget: list[Callable[[], None]] = []


def measured(kernel: str, numbers: Sequence[object], shipped: T, candidates: Sequence[T], device: int) -> T:
    """The tile of a kernel on a card.

    Args:
        kernel: the kernel's name, `operator.kernel`.
        numbers: what the tile depends on, such as channels and bytes of an operand; words without blanks.
        shipped: the tile where nothing was measured.
        candidates: the tiles that a tuner may choose; others in a table are refused.
        device: index of the card.

    Returns:
        The tile on trial, the measured one, or the shipped one.

    Raises:
        ConfigError: the card's table cannot be read, is another card's, or names a tile that the kernel does not take.
    """
    key = " ".join((kernel, *map(str, numbers)))
    _asked[key] = shipped
    _candidates[key] = {shipped, *candidates}
    if key in _trial:
        return cast(T, _trial[key])
    tile = read(place(device), torch.cuda.get_device_name(device)).get(key, shipped)
    if tile not in _candidates[key]:
        accepted = ", ".join(str(list(known)) for known in sorted(_candidates[key], key=str))
        raise ConfigError(
            f"{place(device)}: {key}: the tile {list(tile)} is not accepted; known are {accepted}. {_MEND}"
        )
    return cast(T, tile)


def remembered(lookup: Callable[[], None]) -> None:
    """Registers the `cache_clear` of a function that remembers tiles, to be called when they change."""
    _forget.append(lookup)


def candidates() -> dict[str, list[Tile]]:
    """For every kernel that has been asked for since `forget`: the tiles to choose from, the shipped one first."""
    return {key: [tile, *sorted(_candidates[key] - {tile}, key=str)] for key, tile in _asked.items()}


def forget() -> None:
    """Forgets which tiles were asked for and what tables said."""
    _asked.clear()
    read.cache_clear()
    for clear in _forget:
        clear()


@contextlib.contextmanager
def trial(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Lets kernels take these tiles, by key, inside the block."""
    before = dict(_trial)
    _trial.update(tiles)
    forget()
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)
        forget()


def place(device: int) -> Path:
    """Where the table of a card is, or would be."""
    named = os.environ.get("FARSPAN_TILES")
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache / "farspan" / "tiles" / f"{name}.json"


@functools.cache
def read(path: Path, device_name: str) -> dict[str, Tile]:
    """The tiles of a table; none where there is no file.

    Args:
        path: the file.
        device_name: name of the card that it has to be measured on.

    Raises:
        ConfigError: the file cannot be read, is no table of tiles, or is another card's.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a table of tiles: {error}. {_MEND}") from error
    tiles = table.get("tiles") if isinstance(table, dict) else None
    if not isinstance(tiles, dict) or not all(_is_tile(tile) for tile in tiles.values()):
        raise ConfigError(f'{path} is no table of tiles; wanted {{"tiles": {{"kernel numbers": [integers]}}}}. {_MEND}')
    if table.get("format") != FORMAT:
        raise ConfigError(f"{path} has the format {table.get('format')!r}; this version reads {FORMAT}. {_MEND}")
    if table.get("device") != device_name:
        raise ConfigError(f"{path} was measured on {table.get('device')!r}, and this card is {device_name!r}. {_MEND}")
    return {key: tuple(tile) for key, tile in tiles.items()}


def table(tiles: Mapping[str, Tile], device_name: str) -> bytes:
    """The content of the file that `read` understands."""
    entries = {key: list(tile) for key, tile in sorted(tiles.items())}
    return (json.dumps({"format": FORMAT, "device": device_name, "tiles": entries}, indent=2) + "\n").encode()


def _is_tile(tile: object) -> bool:
    return isinstance(tile, list) and all(x is None or (type(x) is int and x >= 0) for x in tile)
