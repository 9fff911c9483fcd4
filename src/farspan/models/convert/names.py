"""Maps between published parameter names and ours: renaming and reshaping, both ways, nothing lost on either."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

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
        return Entry(published_prefix + self.published, our_prefix + self.ours, self.published_shape, self.our_shape)


def to_ours(state: Mapping[str, Tensor], entries: Iterable[Entry], partial: bool = False) -> dict[str, Tensor]:
    """Renames and reshapes published tensors.

    Args:
        state: published name → tensor.
        entries: the map.
        partial: whether parameters of the map may be absent (a set of gradients, one shard).

    Raises:
        CheckpointError: naming what is missing and what is not in the map.
    """
    known = {entry.published: entry for entry in entries}
    _check(state, known, partial)
    return {known[name].ours: _shaped(x, known[name].our_shape) for name, x in state.items()}


def to_published(state: Mapping[str, Tensor], entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    known = {entry.ours: entry for entry in entries}
    _check(state, known, partial=False)
    return {known[name].published: _shaped(x, known[name].published_shape) for name, x in state.items()}


def _shaped(x: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    return x if shape is None else x.reshape(shape)


def _check(state: Mapping[str, Tensor], known: Mapping[str, Entry], partial: bool) -> None:
    extra = sorted(set(state) - set(known))
    missing = [] if partial else sorted(set(known) - set(state))
    if extra or missing:
        raise CheckpointError(
            f"The state dict does not fit: missing {missing or 'nothing'}, not known {extra or 'none'}."
        )
