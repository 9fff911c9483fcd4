"""One width, depth and vocabulary for every mixer, so that speeds compare: a LLaMA of 374 million parameters."""

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset


def _same_shape(mixer: str) -> FarspanConfig:
    return FarspanConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=8 if mixer == "metala" else 16,
        mixers=[mixer],
    )


PRESETS = {
    "softmax-374m": Preset(lambda: _same_shape("softmax"), 373_867_520, "Farspan"),
    "collinear-374m": Preset(lambda: _same_shape("collinear"), 373_867_520, "Farspan"),
    "dilated-374m": Preset(lambda: _same_shape("dilated"), 373_867_520, "Farspan"),
    "dynamic-mask-374m": Preset(lambda: _same_shape("dynamic_mask"), 374_264_192, "Farspan"),
    "metala-374m": Preset(lambda: _same_shape("metala"), 374_002_688, "Farspan"),
    "cosine-374m": Preset(lambda: _same_shape("cosine"), 373_867_904, "Farspan"),
}
