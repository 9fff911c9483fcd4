"""Names that load their module when they are first used, so that imports stay light."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def lazy_attributes(homes: Mapping[str, str]) -> Callable[[str, str], Any]:
    """For a package's `__getattr__`: looks a name up in the module that `homes` gives for it.

    A home that ends in the name itself, such as `"farspan.models.presets"` for `presets`, is the module to return.
    """

    def load(package: str, name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(homes[name])
        return module if homes[name].endswith(f".{name}") else getattr(module, name)

    return load


class LazyValues(dict):
    """A dict in which a value `"module:attribute"` is replaced by what it names when it is first looked up."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, str):
            module, _, attribute = value.partition(":")
            value = getattr(importlib.import_module(module), attribute)
            self[key] = value
        return value

    def values(self) -> list[Any]:  # type: ignore[override]
        return [self[key] for key in self]

    def items(self) -> list[tuple[Any, Any]]:  # type: ignore[override]
        return [(key, self[key]) for key in self]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function once a module has been executed, whoever imports it and whenever."""

    def __init__(self, callbacks: dict[str, Callable[[], None]]) -> None:
        self.callbacks = callbacks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.callbacks:
            return None
        callback = self.callbacks.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            callback()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(callbacks: dict[str, Callable[[], None]]) -> None:
    """Runs each callback when its module is imported, at once if it already is."""
    waiting = {}
    for name, callback in callbacks.items():
        if name in sys.modules:
            callback()
        else:
            waiting[name] = callback
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))
