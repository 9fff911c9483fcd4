"""Named sizes: `presets.get("metala-3m")` is a configuration to start from.

All published sizes of the systems that Farspan holds, and small ones for laptops. The vocabulary and the special tokens
are the tokenizer's business; training sets them. Parameter counts are for the default vocabulary of each preset.
"""

import importlib

from farspan.errors import ConfigError, nearest
from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset

__all__ = ["Preset", "find", "get", "names"]

_MODULES = ("small", "benchmark", "cottention", "metala", "longnet", "vision", "coca", "doge", "cheems")


def _all() -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    for module in _MODULES:
        found |= importlib.import_module(f"farspan.models.presets.{module}").PRESETS
    return found


def names() -> list[str]:
    """All presets."""
    return sorted(_all())


def find(name: str) -> Preset:
    """The preset called `name`, with its source and its number of parameters.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    known = _all()
    if name not in known:
        raise ConfigError(f"Unknown preset {name!r}: {nearest(name, known)}")
    return known[name]


def get(name: str) -> FarspanConfig:
    """The configuration called `name`.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    return find(name).config()
