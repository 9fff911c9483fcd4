"""LongNet's sizes and the patterns that it is trained with.

Source: Ding et al. 2023, arXiv 2307.02486 (tables of hyper-parameters); microsoft/torchscale for the block. The
vocabulary is that of the tokenizer cl100k, which the paper names. The paper gives sizes by name alone; that the head is
tied is our choice, which comes nearest to them.
"""

from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset

_SOURCE = "arXiv 2307.02486, microsoft/torchscale"
# What torchscale computes, and weights that were trained with it need.
TORCHSCALE: dict[str, Any] = {"head_offset": "block", "pad_mode": "zero_keys", "detach_mixture_weights": True}
# The tokenizer's ranks and special tokens.
_CL100K = 100277


def longnet_block(
    segment_lengths: list[int],
    dilations: list[int],
    *,
    norm_place: str = "sub",
    sub_norm: bool = True,
    positions: str = "none",
    norm_eps: float = 1e-5,
    xpos_scale_base: float = 512.0,
    attention_dropout: float = 0.0,
    released: bool = True,
) -> dict[str, Any]:
    """The fields that make a stack a LongNet as torchscale builds it, whatever its size.

    Args:
        segment_lengths: w per pattern.
        dilations: r per pattern.
        norm_place: as in `FarspanConfig`.
        sub_norm: whether a norm stands inside of each branch.
        positions: `none` or `xpos`.
        norm_eps: epsilon of all norms.
        xpos_scale_base: as in `DilatedOptions`.
        attention_dropout: of the attention weights.
        released: whether offsets, ragged segments and backward are torchscale's, or the paper's.
    """
    return {
        "mixers": ["dilated"],
        "mixer_options": {
            "dilated": {
                "segment_lengths": segment_lengths,
                "dilations": dilations,
                **(TORCHSCALE if released else {}),
                "positions": positions,
                "attention_bias": True,
                "sub_norm": sub_norm,
                "norm_eps": norm_eps,
                "xpos_scale_base": xpos_scale_base,
                "attention_dropout": attention_dropout,
            }
        },
        "feed_forwards": ["mlp"],
        "feed_forward_options": {"mlp": {"bias": True, "sub_norm": sub_norm}},
        "norm_type": "layer_norm",
        "norm_eps": norm_eps,
        "norm_place": norm_place,
    }


def _longnet(width: int, layers: int, heads: int) -> FarspanConfig:
    block = longnet_block([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12], positions="xpos", released=False)
    return FarspanConfig(
        vocab_size=_CL100K,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu",
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        **block,
    )


PRESETS = {
    "longnet-125m": Preset(lambda: _longnet(768, 12, 12), 162_160_896, _SOURCE),
    "longnet-350m": Preset(lambda: _longnet(1024, 24, 16), 405_240_832, _SOURCE),
    "longnet-760m": Preset(lambda: _longnet(1536, 24, 16), 834_353_664, _SOURCE),
    "longnet-2.7b": Preset(lambda: _longnet(2560, 32, 32), 2_775_180_800, _SOURCE),
}
