"""Planning the way from Farspan back to the form in which a family is published."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farspan.errors import CheckpointError, FarspanError
from farspan.mixers.base import MIXERS
from farspan.models.configuration import FarspanConfig
from farspan.models.convert import families
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Constant, Copy
from farspan.models.convert.plan import (
    Plan,
    check_map,
    check_names,
    check_tensors,
    head_of_its_own,
    in_order,
    outputs,
    skeleton,
    writing,
)
from farspan.models.convert.source import Source, read_json, some
from farspan.nn.feed_forward import FEED_FORWARDS

RECORD = "conversion.json"
# Fields that say how a file was written.
_BOOKKEEPING = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
# Fields that act in training or name a default alone: a published form that lacks them loses nothing of the model.
_TRAINING = (
    "classifier_dropout",
    "drop_path_rate",
    "embedding_dropout",
    "hidden_dropout",
    "initializer_range",
    "use_cache",
)


_RECORD_FIELDS: dict[str, Any] = {
    "family": str,
    "config": dict | None,
    "optional": dict,
    "ignored": list,
    "renamed": dict,
    "untied": bool,
}


def plan_out(source: Source, family: str | None = None) -> Plan:
    """What writing a Farspan model in its published form will do.

    Args:
        source: a directory of a Farspan model.
        family: name of the family to write; None is the one that the model was converted from.

    Raises:
        CheckpointError: if the model is not whole, or is none that the family can express.
    """
    config, record = load_config(source), _read_record(source.directory / RECORD)
    if family is not None and family != record.get("family"):
        record = {}
    model, held = skeleton(config)
    shapes = {name: tuple(x.shape) for name, x in held.items()}
    check_names(source.tensors, shapes, shapes, f"the {type(model).__name__} that config.json describes")
    check_tensors(source.tensors, shapes, "the model")
    name = family or record.get("family")
    if name is None:
        fitting = [found.name for found in families.families().values() if _expresses(found, config, held)]
        raise CheckpointError(
            f"{source.path} does not say what it was converted from; name the form to write with --family. It fits "
            f"{', '.join(fitting) or 'none of the known families'}."
        )
    kind = families.get(name)
    entries = _entries(kind, config, held, bool(record.get("untied")))
    optional, renamed = record.get("optional"), record.get("renamed", {})
    kept = [entry for entry in entries if entry.our_names() or optional is None or entry.published in optional]
    steps = in_order(
        source,
        [
            writing(entry, renamed.get(entry.published, entry.published), _dtype((optional or {}).get(entry.published)))
            for entry in kept
        ],
    )
    written = outputs(source, steps)
    current = {entry.published: written[renamed.get(entry.published, entry.published)] for entry in kept}
    published, notes = _published_config(
        kind, config, {name: tuple(x.shape) for name, x in current.items()}, record.get("config"), record.get("untied")
    )
    if record.get("ignored"):
        notes.append(f"Buffers without meaning are not written again: {some(record['ignored'])}.")
    return Plan(
        family=kind,
        source=source,
        config=config,
        published=published,
        steps=steps,
        outputs=written,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        inward=False,
        derived=[entry.published for entry in kept if isinstance(entry, Constant)],
        copies=[entry.published for entry in kept if isinstance(entry, Copy)],
        notes=notes,
    )


def load_config(source: Source) -> FarspanConfig:
    """The configuration of a Farspan directory.

    Raises:
        CheckpointError: if it is none, or not accepted.
    """
    kind = source.config.get("model_type")
    if kind != FarspanConfig.model_type:
        raise CheckpointError(
            f"{source.path} is no Farspan model (model_type is {kind!r}); leave out --to original to convert it."
        )
    try:
        return FarspanConfig.from_dict(source.config)
    except FarspanError as error:
        raise CheckpointError(f"config.json of {source.path} is not accepted: {error}") from error


def _read_record(path: Path) -> dict[str, Any]:
    """What the way in left for the way back; empty if the model was never converted."""
    record = read_json(path)
    if record is None:
        return {}
    for name, kind in _RECORD_FIELDS.items():
        value = record.get(name)
        if not isinstance(value, kind) or (kind is dict and not all(isinstance(x, str) for x in value.values())):
            raise CheckpointError(
                f"{path} is damaged: {name} is {value!r}. Put it back, or delete it and use --family."
            )
    return record


def differences(one: FarspanConfig, other: FarspanConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations differ → both values; options that are left out count as their defaults."""
    a, b = _canonical(one), _canonical(other)
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


def _canonical(config: FarspanConfig) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if name not in _BOOKKEEPING}
    for registry, names, which in (
        (MIXERS, config.mixers, "mixer_options"),
        (FEED_FORWARDS, config.feed_forwards, "feed_forward_options"),
    ):
        options = {name: registry.build_options(name, fields[which].get(name)) for name in names}
        fields[which] = {name: dataclasses.asdict(value) for name, value in options.items()}
    return fields


def _entries(family: Family, config: FarspanConfig, held: Mapping[str, Tensor], untied: bool) -> list[AnyEntry]:
    with _expressing(family, config):
        entries = family.entries(config)
    entries = head_of_its_own(entries) if untied else entries
    check_map(held, entries, family.title)
    return entries


@contextlib.contextmanager
def _expressing(family: Family, config: FarspanConfig) -> Iterator[None]:
    """A clear message in place of whatever a family says to a model that is not its own."""
    try:
        yield
    except FarspanError:
        raise
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{family.title} cannot express this model, whose mixers are {', '.join(dict.fromkeys(config.mixers))}."
        ) from error


def _published_config(
    family: Family,
    config: FarspanConfig,
    shapes: Mapping[str, tuple[int, ...]],
    recorded: dict[str, Any] | None,
    untied: bool | None,
) -> tuple[dict[str, Any], list[str]]:
    """The config.json to write: the one that was converted if it still holds, with changes written over it if not."""
    with _expressing(family, config):
        written = family.write_config(config)
    candidates = [{**recorded}, {**recorded, **written}] if recorded else []
    lost: dict[str, tuple[Any, Any]] = {}
    for candidate in (*candidates, written):
        with _expressing(family, config):
            lost = differences(config, family.read_config(Published(candidate, shapes)))
        lost = {name: values for name, values in lost.items() if not (untied and name == "tie_word_embeddings")}
        if set(lost) <= set(_TRAINING) and (not lost or candidate is written):
            notes = [f"{family.title} has no {some(lost)}: left out, which matters in training alone."] if lost else []
            return candidate, notes
    raise CheckpointError(
        f"{family.title} cannot express this model: "
        + "; ".join(
            f"{name} is {ours!r} and would be {theirs!r}"
            for name, (ours, theirs) in lost.items()
            if name not in _TRAINING
        )
        + "."
    )


def _expresses(family: Family, config: FarspanConfig, held: Mapping[str, Tensor]) -> bool:
    try:
        entries = _entries(family, config, held, untied=False)
        shapes = {entry.published: tuple(entry.write(held).shape) for entry in entries}
        published, _ = _published_config(family, config, shapes, None, None)
    except FarspanError:
        return False
    return family.matches(Published(published, shapes))


def _dtype(name: str | None) -> torch.dtype | None:
    found = getattr(torch, name, None) if name else None
    return found if isinstance(found, torch.dtype) else None
