"""Named building blocks: how `FarspanConfig(mixers=["metala", ...])` finds its classes, and how users add their own."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from farspan.errors import ConfigError, nearest
from farspan.nn.options import build

Block = TypeVar("Block")


class Registry(Generic[Block]):
    """Maps a name to a block class and the dataclass of its options.

    Built-in blocks are named by module path and imported when they are first asked for, so that listing them is cheap.

    Args:
        what: the word for one entry in error messages, e.g. `"mixer"`.
        builtin: name -> `"module:Class:OptionsClass"`.
    """

    def __init__(self, what: str, builtin: Mapping[str, str]) -> None:
        self.what = what
        self._builtin = dict(builtin)
        self._entries: dict[str, tuple[type[Block], type]] = {}

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted({*self._builtin, *self._entries})

    def register(self, name: str, block: type[Block], options: type) -> None:
        """Adds `block` under `name`; `options` is the dataclass whose fields a config may set for it.

        Raises:
            ConfigError: if the name is taken by another class or `options` is no dataclass.
        """
        if not dataclasses.is_dataclass(options):
            raise ConfigError(f"The options of {self.what} {name!r} must be a dataclass, got {options!r}.")
        known = self._entries.get(name)
        if name in self._builtin or (known is not None and known[0] is not block):
            raise ConfigError(f"{self.what} name {name!r} is taken; choose another name.")
        self._entries[name] = (block, options)

    def get(self, name: str) -> tuple[type[Block], type]:
        """The class and the options dataclass registered under `name`.

        Raises:
            ConfigError: for an unknown name, with the nearest known one.
        """
        if name not in self._entries:
            if name not in self._builtin:
                raise ConfigError(f"Unknown {self.what} {name!r}: {nearest(str(name), self.names())}")
            path, block, options = self._builtin[name].split(":")
            module = importlib.import_module(path)
            self._entries[name] = (getattr(module, block), getattr(module, options))
        return self._entries[name]

    def build_options(self, name: str, values: Mapping[str, Any] | None) -> Any:
        """The options of `name` with `values` over their defaults; unknown keys and wrong values are refused."""
        _, options = self.get(name)
        return build(options, values, f"{self.what} {name!r}")
