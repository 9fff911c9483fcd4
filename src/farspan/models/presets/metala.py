"""MetaLA's sizes.

The repository gives the default shape of the smallest model and the rule for the channel mixer's width, the paper the
number of parameters and which models tie their embeddings. Depth and width of the larger ones, the vocabulary (that of
GPT-NeoX's tokenizer, since the models are trained on the Pile with that code) and hence the exact counts are ours.
"""

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset

_SOURCE = "BICLab/MetaLA, arXiv 2411.10741; exact shape not published"


def _metala(
    width: int, layers: int, heads: int, *, inner: int | None = None, tied: bool = False, trained: int = 2048
) -> FarspanConfig:
    return FarspanConfig(
        vocab_size=50304,
        hidden_size=width,
        intermediate_size=inner or -(-8 * width // (3 * 256)) * 256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mixers=["metala"],
        norm_type="simple_rms_norm",
        max_position_embeddings=trained,
        tie_word_embeddings=tied,
    )


PRESETS = {
    "metala-360m": Preset(lambda: _metala(1024, 24, 8, tied=True), 359_927_808, _SOURCE),
    # Its channel mixer is narrower than the rule, to have the size that the paper names.
    "metala-380m": Preset(lambda: _metala(1024, 24, 8, inner=2432), 383_127_552, _SOURCE),
    "metala-1b": Preset(lambda: _metala(2048, 16, 16), 1_028_308_992, _SOURCE),
    "metala-1.3b": Preset(lambda: _metala(2048, 24, 16, tied=True), 1_336_418_304, _SOURCE),
    "metala-1.4b": Preset(lambda: _metala(2048, 24, 16), 1_439_440_896, _SOURCE),
    "metala-3b": Preset(lambda: _metala(3072, 24, 24), 3_027_382_272, _SOURCE),
}
