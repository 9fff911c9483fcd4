"""Published checkpoints: their families, and `convert`, which reads them and writes them back."""

from typing import TYPE_CHECKING, Any

from farspan._lazy import lazy_attributes

if TYPE_CHECKING:
    from farspan.models.convert.run import Conversion, convert

__all__ = ["Conversion", "convert"]

_load = lazy_attributes({"Conversion": "farspan.models.convert.run", "convert": "farspan.models.convert.run"})


def __getattr__(name: str) -> Any:
    return _load(__name__, name)
