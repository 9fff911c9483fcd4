"""Named sizes: `presets.get("metala-3m")` is a configuration to start from.

The vocabulary and the special tokens are the tokenizer's business; training sets them. Parameter counts below are for
the default vocabulary of each preset and are tested on the meta device.
"""

from collections.abc import Callable
from typing import Any

from farspan.errors import ConfigError, nearest
from farspan.models.configuration import FarspanConfig


def _small(**fields: Any) -> FarspanConfig:
    """Three million parameters: trains on a laptop in minutes."""
    shape = {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }
    return FarspanConfig(**{**shape, **fields})


PRESETS: dict[str, Callable[[], FarspanConfig]] = {
    "metala-3m": lambda: _small(mixers=["metala"], num_hidden_layers=5),
    "softmax-3m": lambda: _small(mixers=["softmax"], num_hidden_layers=5),
    "hybrid-3m": lambda: _small(mixers=["metala", "metala", "softmax"], num_hidden_layers=6, intermediate_size=384),
}


def names() -> list[str]:
    """All presets."""
    return sorted(PRESETS)


def get(name: str) -> FarspanConfig:
    """The configuration called `name`.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        raise ConfigError(f"Unknown preset {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]()
