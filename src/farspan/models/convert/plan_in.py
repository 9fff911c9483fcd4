"""Planning the way from a published checkpoint to Farspan."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import farspan
from farspan.errors import CheckpointError, FarspanError
from farspan.models.configuration import FarspanConfig
from farspan.models.convert import families
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Constant, Copy, Entry, current_name
from farspan.models.convert.plan import (
    EMBEDDING,
    Plan,
    check_map,
    check_names,
    check_tensors,
    head_of_its_own,
    in_order,
    main_dtype,
    outputs,
    reading,
    skeleton,
    word,
)
from farspan.models.convert.source import Source, some

# Fields of a published configuration that say nothing of the model.
_BOOKKEEPING = {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"}
# A buffer in 16 bits against the same in 32; a stretched or other one is far beyond it.
_BUFFER_TOLERANCE = 1e-2


def plan_in(source: Source, family: str | None = None) -> Plan:
    """What converting a published checkpoint will do.

    Args:
        source: the checkpoint.
        family: name of its family; None tells it from names, shapes and configuration.

    Raises:
        CheckpointError: if it is of no known family, or not whole, or not what its configuration says.
    """
    if source.config.get("model_type") == FarspanConfig.model_type:
        raise CheckpointError(f"{source.path} is a Farspan model already; --to original is the way back.")
    stored = {current_name(name): name for name in source.tensors}
    if twice := set(source.tensors) - set(stored.values()):
        raise CheckpointError(f"{source.path} has tensors under their old and their new names: {some(sorted(twice))}.")
    found = {name: source.tensors[raw] for name, raw in stored.items()}
    asked = _Asked(source.config)
    published = Published(asked, {name: x.shape for name, x in found.items()})
    kind, hint = _family(Published(source.config, published.shapes), family)
    config, entries, held = _model(kind, published, source, hint)
    what = _title(kind)
    ignored = [name for name in stored if kind.ignores(name)]
    check_names(
        set(stored) - set(ignored),
        [entry.published for entry in entries],
        [entry.published for entry in entries if entry.our_names()],
        what,
        hint,
    )
    check_map(held, entries, what)
    present = [entry for entry in entries if entry.published in stored]
    shapes = {entry.published: entry.write(held).shape for entry in present if not isinstance(entry, Constant)}
    check_tensors(found, shapes, what)
    copies = [entry for entry in present if isinstance(entry, Copy)]
    untied = [copy for copy in copies if not _is_copy(source, stored, copy, entries)]
    if untied:
        config.tie_word_embeddings = False
        entries = head_of_its_own(kind.entries(config))
        check_map(skeleton(config)[1], entries, what)
    model, _ = skeleton(config)
    steps = in_order(source, [reading(entry, stored[entry.published]) for entry in entries if entry.our_names()])
    derived = [entry for entry in present if isinstance(entry, Constant)]
    optional = [entry.published for entry in present if isinstance(entry, Constant | Copy) and entry not in untied]
    return Plan(
        family=kind,
        source=source,
        config=config,
        published=source.config,
        steps=steps,
        outputs=outputs(source, steps),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        inward=True,
        derived=[stored[entry.published] for entry in derived],
        copies=[stored[entry.published] for entry in copies if entry not in untied],
        ignored=[stored[name] for name in ignored],
        notes=[
            *([f"{hint.strip()} It is converted as {kind.title}, as it was asked for."] if hint else []),
            *_claims(kind, source, asked),
            *kind.notes(Published(source.config, published.shapes)),
            *_untied(untied),
            *_odd_buffers(source, stored, derived),
            *_mixed(source, steps),
        ],
        assumed=asked.assumed,
        unread=[name for name in source.config if name not in asked.read | _BOOKKEEPING and not name.startswith("_")],
        record={
            "family": kind.name,
            "farspan_version": farspan.__version__,
            "config": source.config if source.config_from == "config.json" else None,
            "dtype": word(main_dtype((x.dtype, x.elements) for x in found.values())),
            "optional": {name: word(found[name].dtype) for name in optional},
            "ignored": [stored[name] for name in ignored],
            "renamed": {name: raw for name, raw in stored.items() if name != raw},
            "untied": bool(untied),
        },
    )


def _model(
    family: Family, published: Published, source: Source, hint: str
) -> tuple[FarspanConfig, list[AnyEntry], dict[str, Tensor]]:
    """Farspan's configuration, the map, and the tensors of the model; a clear message where there are none."""
    failed = f"{source.path} cannot be read as {_title(family)}"
    try:
        config = family.read_config(published)
        return config, family.entries(config), skeleton(config)[1]
    except FarspanError as error:
        raise CheckpointError(f"{failed}: {error}{hint}") from error
    except KeyError as error:
        where = "among its parameters"
        if error.args[0] in getattr(published.config, "read", ()):
            where = "in config.json" if source.config_from else "in config.json, which it has not; put one there"
        raise CheckpointError(f"{failed}: {error.args[0]!r} is missing {where}.{hint}") from error
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise CheckpointError(f"{failed}: config.json or the shapes are not as expected ({error}).{hint}") from error


def _family(published: Published, name: str | None) -> tuple[Family, str]:
    """The family that is named or found; and, if the one that is named is not what it looks like, a hint of that."""
    if name is None:
        try:
            return families.detect(published), ""
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_nearest(published)}") from None
    named = families.get(name)
    fitting = [family for family in families.families().values() if family.matches(published)]
    if not fitting or named in fitting:
        return named, ""
    return named, f" It looks like {' or '.join(_title(family) for family in fitting)}."


def _nearest(published: Published) -> str:
    """Of a checkpoint that no family takes for its own, which it resembles most, and what is wrong with it then."""
    best: tuple[float, str] = (0.5, "")
    guessed = Published(published.config, _Guessed(published.shapes))
    for family in families.families().values():
        try:
            if family.matches(published):
                return ""
            config = family.read_config(guessed)
            known = {entry.published: bool(entry.our_names()) for entry in family.entries(config)}
        except Exception:
            continue
        present = {name for name in published.shapes if not family.ignores(name)}
        alike = len(present & set(known)) / len(present | set(known))
        if alike > best[0]:
            try:
                check_names(present, known, [name for name, needed in known.items() if needed], _title(family))
            except CheckpointError as error:
                best = alike, f" Nearest: {error}"
    return best[1]


def _title(family: Family) -> str:
    return f"{family.title} (--family {family.name})"


def _is_copy(source: Source, stored: Mapping[str, str], copy: Copy, entries: list[AnyEntry]) -> bool:
    """Whether a tensor repeats the one that it should; a head that does not repeat the embedding may stand alone."""
    original = next(entry.published for entry in entries if isinstance(entry, Entry) and entry.ours == copy.ours)
    if _same(source, stored[copy.published], stored[original]):
        return True
    if copy.ours == EMBEDDING:
        return False
    raise CheckpointError(
        f"{copy.published} should repeat {original}, but it differs; which of the two the model used is not told. Make "
        "them equal, or remove the first."
    )


def _same(source: Source, first: str, second: str) -> bool:
    one, other = source.tensors[first], source.tensors[second]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    a, b = (source.read(name).contiguous().reshape(-1).view(torch.uint8) for name in (first, second))
    return torch.equal(a, b)


def _claims(family: Family, source: Source, asked: "_Asked") -> Iterator[str]:
    if family.traps and "model_type" in source.config:
        yield family.traps
    if source.config_from is None:
        values = ", ".join(f"{name}={value!r}" for name, value in asked.assumed.items())
        yield f"There is no config.json; assumed: {values or 'nothing, the shapes tell all'}."
    elif source.config_from != "config.json":
        yield f"There is no config.json; the configuration is {source.config_from}."


def _untied(copies: list[Copy]) -> Iterator[str]:
    for copy in copies:
        yield f"{copy.published} is not the embedding, which config.json says; the model gets a head of its own."


def _odd_buffers(source: Source, stored: Mapping[str, str], constants: list[Constant]) -> Iterator[str]:
    odd = []
    for constant in constants:
        x, value = source.read(stored[constant.published]), constant.value
        if x.shape != value.shape or not torch.allclose(x.double(), value.double(), rtol=_BUFFER_TOLERANCE, atol=1e-6):
            odd.append(constant.published)
    if odd:
        yield f"The buffer {some(odd, 1)} is not what config.json says; it is computed anew from config.json."


def _mixed(source: Source, steps: list[Any]) -> Iterator[str]:
    kinds = sorted({word(source.tensors[name].dtype) for step in steps for name in step.reads})
    if len(kinds) > 1:
        yield (
            f"The parameters are of several types ({', '.join(kinds)}), which are kept; from_pretrained makes them "
            "one: the dtype that it is given, or that of most of them."
        )


class _Guessed(dict[str, tuple[int, ...]]):
    """Shapes in which a matrix that is missing has some shape, for names are all that is asked for."""

    def __missing__(self, name: str) -> tuple[int, ...]:
        return (1, 1)


class _Asked(Mapping[str, Any]):
    """A published configuration that remembers what was asked of it.

    Attributes:
        assumed: absent fields → the values that were taken instead.
        read: fields that were asked for.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.assumed: dict[str, Any] = {}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._config[name]

    def get(self, name: str, default: Any = None) -> Any:
        if name in self:
            return self[name]
        if default is not None:
            self.assumed[name] = default
        return default

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return name in self._config

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)
