"""Sizes that train on a laptop."""

from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset


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


PRESETS = {
    "metala-3m": Preset(lambda: _small(mixers=["metala"], num_hidden_layers=5), 3_005_664, "Farspan"),
    "softmax-3m": Preset(lambda: _small(mixers=["softmax"], num_hidden_layers=5), 3_000_384, "Farspan"),
    "hybrid-3m": Preset(
        lambda: _small(mixers=["metala", "metala", "softmax"], num_hidden_layers=6, intermediate_size=384),
        3_004_992,
        "Farspan",
    ),
}
