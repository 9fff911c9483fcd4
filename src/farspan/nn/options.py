"""Options dataclasses from plain values, which are checked against the annotations of their fields."""

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from farspan.errors import ConfigError, nearest


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON-like value is of the annotated type. Numbers have to be finite; a bool is no number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        keys, items = arguments
        return isinstance(value, dict) and all(fits(key, keys) and fits(item, items) for key, item in value.items())
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def words(hint: Any) -> str:
    """An annotation as an error message names it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if hint is float:
        return "a finite number"
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)


def build(options: type, values: Mapping[str, Any] | None, what: str) -> Any:
    """An options dataclass with `values` over its defaults.

    Args:
        options: the dataclass.
        values: field → value, as JSON holds it.
        what: whose options these are, for error messages.

    Raises:
        ConfigError: for unknown keys and values of a wrong type.
    """
    hints = typing.get_type_hints(options)
    for key, value in (values or {}).items():
        if key not in hints:
            raise ConfigError(f"Unknown option {key!r} of {what}: {nearest(key, hints)}")
        if not fits(value, hints[key]):
            raise ConfigError(f"Option {key}={value!r} of {what} is of the wrong type; accepted: {words(hints[key])}.")
    return options(**(values or {}))
