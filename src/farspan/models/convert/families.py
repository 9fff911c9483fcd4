"""What a published family of checkpoints is, and the list of all that are known."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from farspan.errors import CheckpointError, nearest
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.names import AnyEntry

# Modules beside this one, each with a tuple `FAMILIES`; the order decides nothing but how messages list them.
_MODULES = ("coca", "cottention", "doge", "cheems", "metala", "longnet", "vision", "transformers_llms")


@dataclass(frozen=True)
class Published:
    """What is known of a checkpoint before any of its tensors is read.

    Attributes:
        config: the content of its `config.json`; empty when there is none.
        shapes: name → shape of every tensor.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def layers(self, prefix: str) -> int:
        """Number of consecutive layers whose names start with `prefix` and an index, such as `model.layers.`."""
        found = {name[len(prefix) :].partition(".")[0] for name in self.shapes if name.startswith(prefix)}
        return next(i for i in range(len(found) + 1) if str(i) not in found)


@dataclass(frozen=True)
class Family:
    """One published family: how to know it, and both directions of its configuration and its parameters.

    Attributes:
        name: what `farspan convert --family` calls it.
        title: what messages call it.
        matches: whether names and shapes are this family's. The state dict decides, not `model_type`: CoCA and
            Cottention checkpoints claim to be stock models.
        read_config: the Farspan configuration, with `architectures` naming the class to build. Settings are taken from
            the published config; what it does not hold is read from the shapes; what neither holds is the published
            code's default.
        write_config: the published `config.json` of a Farspan configuration; inverse of `read_config` up to fields
            that mean nothing to the model.
        entries: every tensor of a model of that configuration: published name → ours.
        ignored: regular expressions of published buffers that old files hold and that mean nothing.
        traps: for `model_type` claims, what would go wrong in silence: shown when such a checkpoint is converted.
        notes: what else the user should know of a checkpoint, a sentence each.
    """

    name: str
    title: str
    matches: Callable[[Published], bool]
    read_config: Callable[[Published], FarspanConfig]
    write_config: Callable[[FarspanConfig], dict[str, Any]]
    entries: Callable[[FarspanConfig], list[AnyEntry]]
    ignored: tuple[str, ...] = ()
    traps: str | None = None
    notes: Callable[[Published], list[str]] = lambda _: []

    def ignores(self, name: str) -> bool:
        """Whether a published tensor is one of the buffers that mean nothing."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def families() -> dict[str, Family]:
    """All known families by name."""
    found = {}
    for module in _MODULES:
        for family in importlib.import_module(f"farspan.models.convert.{module}").FAMILIES:
            found[family.name] = family
    return found


def get(name: str) -> Family:
    """The family called `name`.

    Raises:
        CheckpointError: for an unknown name, with the nearest known one.
    """
    known = families()
    if name not in known:
        raise CheckpointError(f"Unknown family {name!r}: {nearest(name, known)}")
    return known[name]


def detect(published: Published) -> Family:
    """The one family that a checkpoint is of.

    Raises:
        CheckpointError: if none fits or several do.
    """
    known = families()
    fitting = [family for family in known.values() if family.matches(published)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(sorted(published.shapes)[:5])
    if fitting:
        raise CheckpointError(
            f"This checkpoint could be {', '.join(family.name for family in fitting)}; name one with --family."
        )
    raise CheckpointError(
        f"No known family has such parameters ({names}, …; {len(published.shapes)} in all). Known families: "
        f"{', '.join(known)}."
    )
