"""Dataclasses from YAML: unknown keys, keys given twice and wrong types are refused with their place."""

import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from farspan.errors import ConfigError, nearest

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML in which a key may be given once; of two, YAML itself silently takes the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in given:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value} is given twice; keep one of the two", problem_mark=key.start_mark
                    )
                given.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The plain data of a YAML text.

    Raises:
        yaml.YAMLError: It is not YAML, or gives a key twice; the message says where.
    """
    return yaml.load(text, _Loader)


def build(cls: type[T], values: Any, place: str = "") -> T:
    """Builds the dataclass `cls` from nested dictionaries as YAML or JSON gives them.

    Args:
        cls: A dataclass whose fields all have defaults; nested dataclasses are built the same way.
        values: A mapping of field names to values; None is an empty mapping.
        place: Prefix of the field names in error messages.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: An unknown key (with the nearest accepted one) or a value of another type, with its place.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place or 'the file'}: expected fields and values, got {values!r}.")
    hints = get_type_hints(cls)
    prefix = f"{place}." if place else ""
    for key in values:
        if key not in hints:
            raise ConfigError(f"{prefix}{key} is not a field of a recipe; {nearest(str(key), hints)}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, place: str) -> Any:
    """`value` as the type `hint`, where nothing is lost by it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return build(hint, value, place)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):  # only `X | None` occurs
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, place)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{place}={value!r} is not accepted; {nearest(str(value), map(str, arguments))}")
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 (no dot) as a text, and token counts are best written 1e9: both are taken as numbers.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and hint is float:
            return number
        if number is not None and number.is_integer():
            return value if isinstance(value, int) else int(number)
    kinds = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
    kind = kinds.get(hint) or {list: "a list", dict: "a mapping"}.get(origin, str(hint))
    raise ConfigError(f"{place}={value!r}: expected {kind}, got {type(value).__name__}.")
