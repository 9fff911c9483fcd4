"""What a conversion will do, decided before anything is written: family, configuration, and the way of every tensor."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import farspan.models
from farspan.errors import CheckpointError
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.families import Family
from farspan.models.convert.names import AnyEntry, Constant, Copy, Entry
from farspan.models.convert.shards import Stored
from farspan.models.convert.source import Source, some
from farspan.models.modeling import FarspanPreTrainedModel

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Step:
    """One entry of a family's map at work: the names it reads in the source and those it writes.

    Attributes:
        reads: names in the source.
        writes: names in the destination.
        work: turns the tensors that are read, in order, into those that are written, by name.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    work: Callable[[list[Tensor]], dict[str, Tensor]]


@dataclass
class Plan:
    """A conversion in one direction.

    Attributes:
        family: the published family.
        source: what is read.
        config: Farspan's configuration.
        published: the published configuration, as read or as it will be written.
        steps: every tensor that is written.
        outputs: name → tensor of the meta device, of everything that is written.
        parameters: how many the model has; tied ones count once.
        inward: whether the way is from the published form to Farspan's.
        derived: published buffers that follow from the configuration.
        copies: published tensors that repeat another.
        ignored: published buffers that mean nothing.
        notes: what the user should know.
        assumed: settings that no configuration held → the values taken.
        unread: settings of the configuration that the family has no use for.
        record: what the way back needs beside the tensors.
    """

    family: Family
    source: Source
    config: FarspanConfig
    published: dict[str, Any]
    steps: list[Step]
    outputs: dict[str, Tensor]
    parameters: int
    inward: bool
    derived: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype | None) -> None:
        """Chooses the type of the written parameters, None keeps theirs, and says it in the configuration."""
        if dtype is not None:
            kept = set(self.derived)
            self.outputs = {name: x if name in kept else x.to(dtype) for name, x in self.outputs.items()}
        self.config.dtype = self.dtype
        if not self.inward:
            self.published |= {key: word(self.dtype) for key in ("dtype", "torch_dtype") if key in self.published}

    @property
    def rows(self) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        """The map: published name, published shape, our names."""
        if self.inward:
            return [(step.reads[0], self.source.tensors[step.reads[0]].shape, step.writes) for step in self.steps]
        return [
            (step.writes[0], tuple(self.outputs[step.writes[0]].shape), step.reads) for step in self.steps if step.reads
        ]

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of what is written."""
        return main_dtype((x.dtype, x.numel()) for x in self.outputs.values())


def main_dtype(kinds: Iterable[tuple[Any, int]]) -> torch.dtype:
    """The type that most elements have, given pairs of a type and a number of elements."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, elements in kinds:
        if dtype in FLOATS:
            counts[dtype] += elements
    return counts.most_common(1)[0][0] if counts else torch.float32


def word(dtype: torch.dtype | str) -> str:
    """A type as configurations name it."""
    return str(dtype).removeprefix("torch.")


def skeleton(config: FarspanConfig) -> tuple[FarspanPreTrainedModel, dict[str, Tensor]]:
    """The model on the meta device, and the tensors that its files hold: a tied head is not among them."""
    architecture = (config.architectures or ["FarspanForCausalLM"])[0]
    kind = getattr(farspan.models, architecture) if architecture in farspan.models.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, FarspanPreTrainedModel)):
        raise CheckpointError(f"config.json has architectures={config.architectures}, of which Farspan knows none.")
    with torch.device("meta"):
        model = kind(config)
    model.tie_weights()
    return model, {name: x for name, x in model.state_dict().items() if name not in model.all_tied_weights_keys}


def head_of_its_own(entries: Iterable[AnyEntry]) -> list[AnyEntry]:
    """The map of a model whose head is published as the embedding's copy, but is not it."""
    return [
        Entry(entry.published, HEAD) if isinstance(entry, Copy) and entry.ours == EMBEDDING else entry
        for entry in entries
    ]


def check_names(present: Iterable[str], known: Iterable[str], needed: Iterable[str], what: str, hint: str = "") -> None:
    """Refuses a checkpoint with missing or unknown tensors.

    Raises:
        CheckpointError: with their number and their first names.
    """
    present = set(present)
    missing, extra = sorted(set(needed) - present), sorted(present - set(known))
    if missing or extra:
        parts = [f"{len(missing)} missing ({some(missing)})"] if missing else []
        parts += [f"{len(extra)} not known ({some(extra)})"] if extra else []
        raise CheckpointError(f"These are not the tensors of {what}: {', '.join(parts)}.{hint}")


def check_tensors(found: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuses tensors of another shape, and parameters that are no floating-point numbers.

    Raises:
        CheckpointError: naming the first of them.
    """
    wrong = [name for name, shape in expected.items() if found[name].shape != tuple(shape)]
    if wrong:
        name = wrong[0]
        others = f" ({len(wrong) - 1} others are wrong, too)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{name} in {found[name].file} has shape {list(found[name].shape)}; {what} has {list(expected[name])} "
            f"there{others}. Is the config.json that of these weights?"
        )
    kinds = {name: found[name].dtype for name in expected if found[name].dtype not in FLOATS}
    if kinds:
        name, dtype = next(iter(kinds.items()))
        raise CheckpointError(
            f"{name} in {found[name].file} is {word(dtype)}, as {len(kinds)} parameters are; "
            "accepted: float16, bfloat16, float32, float64. Quantised checkpoints cannot be converted."
        )


def check_map(held: Iterable[str], entries: Iterable[AnyEntry], what: str) -> None:
    """Refuses a map that does not hold every tensor of the model, or holds others.

    Raises:
        CheckpointError: naming them.
    """
    mapped = {name for entry in entries for name in entry.our_names()}
    left, extra = sorted(set(held) - mapped), sorted(mapped - set(held))
    if left or extra:
        raise CheckpointError(
            f"{what} has no place for {some(left)}." if left else f"{what} has {some(extra)}, which this model has not."
        )


def reading(entry: AnyEntry, name: str) -> Step:
    """The step from the published tensor stored as `name` to ours."""
    return Step((name,), entry.our_names(), lambda tensors: entry.read(tensors[0]))


def writing(entry: AnyEntry, name: str, dtype: torch.dtype | None = None) -> Step:
    """The step from our tensors to the published one called `name`; `dtype` is a constant's, None leaves it its own."""
    if isinstance(entry, Constant):
        value = entry.value if dtype is None else entry.value.to(dtype)
        return Step((), (name,), lambda tensors: {name: value})
    names = (entry.ours,) if isinstance(entry, Copy) else entry.our_names()
    return Step(names, (name,), lambda tensors: {name: entry.write(dict(zip(names, tensors, strict=True)))})


def in_order(source: Source, steps: list[Step]) -> list[Step]:
    """The steps in the order of the files, so that each file is opened once, or hardly more often."""
    places = {name: place for place, name in enumerate(source.tensors)}
    return sorted(steps, key=lambda step: min((places[name] for name in step.reads), default=-1))


def outputs(source: Source, steps: Iterable[Step]) -> dict[str, Tensor]:
    """What the steps will write, on the meta device."""
    found: dict[str, Tensor] = {}
    for step in steps:
        made = step.work([_meta(source.tensors[name]) for name in step.reads])
        found |= {name: x.to("meta") for name, x in made.items()}
    return found


def _meta(x: Stored) -> Tensor:
    assert isinstance(x.dtype, torch.dtype)
    return torch.empty(x.shape, dtype=x.dtype, device="meta")
