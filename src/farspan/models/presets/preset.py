"""One named size."""

from collections.abc import Callable
from dataclasses import dataclass

from farspan.models.configuration import FarspanConfig


@dataclass(frozen=True)
class Preset:
    """A named configuration and how many parameters its model has.

    Attributes:
        config: makes the configuration; its `architectures` names the class, causal language model if None.
        parameters: number of parameters, tied ones counted once; tested on the meta device.
        source: where the settings stand.
        published: whether the source gives this number; False marks our own count of the source's settings.
    """

    config: Callable[[], FarspanConfig]
    parameters: int
    source: str
    published: bool = False
