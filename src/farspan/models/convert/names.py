"""Maps between published parameter names and ours: renaming and reshaping, both ways, nothing lost on either."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, stack

from farspan.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """One parameter: its published name and ours, and both shapes where they differ."""

    published: str
    ours: str
    published_shape: tuple[int, ...] | None = None
    our_shape: tuple[int, ...] | None = None

    def under(self, published_prefix: str, our_prefix: str) -> "Entry":
        """The same parameter inside a larger module."""
        return replace(self, published=published_prefix + self.published, ours=our_prefix + self.ours)

    def read(self, x: Tensor) -> dict[str, Tensor]:
        """Our tensors, by name, that the published one holds."""
        return {self.ours: _shaped(x, self.our_shape)}

    def write(self, state: Mapping[str, Tensor]) -> Tensor:
        """The published tensor."""
        return _shaped(state[self.ours], self.published_shape)

    def our_names(self) -> tuple[str, ...]:
        return (self.ours,)


@dataclass(frozen=True)
class Fused:
    """One published tensor that holds several of ours, interleaved: seen as `view`, slice i along `axis` is ours[i].

    Rows q, k, v of one head after another are `Fused("qkv", ("q", "k", "v"), (heads, 3, head_dim, width), axis=1)`. The
    axes but the last become the rows of a matrix on both sides; with `vector=True` (a bias) there are only rows.
    """

    published: str
    ours: tuple[str, ...]
    view: tuple[int, ...]
    axis: int
    vector: bool = False

    def under(self, published_prefix: str, our_prefix: str) -> "Fused":
        """The same parameters inside a larger module."""
        return replace(
            self, published=published_prefix + self.published, ours=tuple(our_prefix + name for name in self.ours)
        )

    def read(self, x: Tensor) -> dict[str, Tensor]:
        """Our tensors, by name, that the published one holds."""
        parts = x.reshape(self.view).unbind(self.axis)
        return {name: part.reshape(self._joined()) for name, part in zip(self.ours, parts, strict=True)}

    def write(self, state: Mapping[str, Tensor]) -> Tensor:
        """The published tensor."""
        part = self.view[: self.axis] + self.view[self.axis + 1 :]
        return stack([state[name].reshape(part) for name in self.ours], dim=self.axis).reshape(self._joined())

    def our_names(self) -> tuple[str, ...]:
        return self.ours

    def _joined(self) -> tuple[int, ...]:
        return (-1,) if self.vector else (-1, self.view[-1])


@dataclass(frozen=True)
class Constant:
    """A published buffer that follows from the configuration: not read, and written as it should be."""

    published: str
    value: Tensor

    def under(self, published_prefix: str, our_prefix: str) -> "Constant":
        """The same buffer inside a larger module."""
        return replace(self, published=published_prefix + self.published)

    def read(self, x: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def write(self, state: Mapping[str, Tensor]) -> Tensor:
        """The value."""
        return self.value

    def our_names(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Copy:
    """A published tensor that repeats one of ours, as a tied head does the embedding: not read, written if wanted."""

    published: str
    ours: str

    def under(self, published_prefix: str, our_prefix: str) -> "Copy":
        """The same tensor inside a larger module."""
        return replace(self, published=published_prefix + self.published, ours=our_prefix + self.ours)

    def read(self, x: Tensor) -> dict[str, Tensor]:
        """Nothing: the parameter itself stands under its own name."""
        return {}

    def write(self, state: Mapping[str, Tensor]) -> Tensor:
        """The repeated tensor."""
        return state[self.ours]

    def our_names(self) -> tuple[str, ...]:
        return ()


AnyEntry = Entry | Fused | Constant | Copy


def affine(published: str, ours: str) -> list[Entry]:
    """Weight and bias of a linear layer or a norm."""
    return [Entry(f"{published}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]


_OLD_NAMES = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    (".input_residual.weight", ".input_residual"),
    (".post_attention_residual.weight", ".post_attention_residual"),
    (".queries_proj.weight", ".queries.weight"),
)


def current_name(name: str) -> str:
    """What a published parameter is called today.

    Files that began in TensorFlow, as BERT's, say gamma and beta; early ones of Doge have residuals with a `.weight`,
    and `queries_proj`.

    Example:
        >>> current_name("bert.embeddings.LayerNorm.gamma")
        'bert.embeddings.LayerNorm.weight'
    """
    for old, new in _OLD_NAMES:
        name = name.replace(old, new)
    return name


def to_ours(state: Mapping[str, Tensor], entries: Iterable[AnyEntry], partial: bool = False) -> dict[str, Tensor]:
    """Renames and reshapes published tensors.

    Args:
        state: published name, of today or old, → tensor.
        entries: the map.
        partial: whether parameters of the map may be absent (a set of gradients, one shard).

    Raises:
        CheckpointError: naming what is missing and what is not in the map.
    """
    state = {current_name(name): x for name, x in state.items()}
    known = {entry.published: entry for entry in entries}
    needed = [] if partial else [name for name, entry in known.items() if entry.our_names()]
    _check(state, known, needed)
    return {ours: part for name, x in state.items() for ours, part in known[name].read(x).items()}


def to_published(state: Mapping[str, Tensor], entries: Iterable[AnyEntry]) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    entries = list(entries)
    known = [name for entry in entries for name in entry.our_names()]
    _check(state, known, known)
    return {entry.published: entry.write(state) for entry in entries}


def _shaped(x: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    return x if shape is None else x.reshape(shape)


def _check(state: Mapping[str, Tensor], known: Iterable[str], needed: Iterable[str]) -> None:
    extra, missing = sorted(set(state) - set(known)), sorted(set(needed) - set(state))
    if extra or missing:
        raise CheckpointError(
            f"The state dict does not fit: missing {missing or 'nothing'}, not known {extra or 'none'}."
        )
