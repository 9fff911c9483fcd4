"""Doge's sizes: the first ones with and without experts, the same in the form of transformers, and later ones.

Source: LoserCheems/WonderfulMatrices: examples/; SmallDoges/small-doge: recipes/; transformers: models/doge.
"""

from collections.abc import Mapping
from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset

_SEED = "LoserCheems/WonderfulMatrices, arXiv 2412.11834"
_HF = "SmallDoges/small-doge, transformers: models/doge"
# Width and depth of each size; the inner width is twice the former, and a head has 128 channels.
_SIZES = {"20m": (256, 8), "60m": (512, 16), "160m": (768, 24), "320m": (1024, 32)}
# Experts, heads that choose, and choices per head of the seed's sizes with experts.
_SEED_EXPERTS = {"20m": (1024, 1, 2), "120m": (4096, 2, 4), "480m": (9216, 3, 6), "1.4b": (16384, 4, 8)}
# Experts and choices of the later recipes.
_EXPERTS = {"40m": (1024, 8), "180m": (4096, 16), "600m": (9216, 24), "1.6b": (16384, 32)}
SEED_ATTENTION = {"bias_heads": "query", "qk_norm": False, "select": "none"}


def doge_block(
    attention: Mapping[str, Any], experts: Mapping[str, Any] | None = None, mlp_bias: bool = False
) -> dict[str, Any]:
    """The fields that make a stack a Doge, whatever its size.

    Args:
        attention: options of `dynamic_mask`.
        experts: options of `cdmoe`; None is the gated MLP alone.
        mlp_bias: whether the projections of the gated MLP have biases.
    """
    options = {"bias": True} if mlp_bias else {}
    name = "gated_mlp" if experts is None else "cdmoe"
    options |= experts or {}
    return {
        "mixers": ["dynamic_mask"],
        "mixer_options": {"dynamic_mask": dict(attention)},
        "feed_forwards": [name],
        "feed_forward_options": {name: options} if options else {},
        "residual_scaling": "per_channel",
    }


def _doge(width: int, depth: int, attention: Mapping[str, Any], **fields: Any) -> FarspanConfig:
    heads = max(width // 128, 1)
    sizes = {
        "vocab_size": 32768,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    experts = fields.pop("experts", None)
    return FarspanConfig(**{**sizes, **doge_block(attention, experts), **fields})


def _seed(size: tuple[int, int], experts: tuple[int, int, int] | None = None) -> FarspanConfig:
    options = None
    if experts is not None:
        names = ("num_experts", "num_expert_heads", "num_experts_per_tok")
        options = {
            **dict(zip(names, experts, strict=True)),
            "router": "query_key",
            "retrieval_size": 64,
            "router_aux_loss_coef": 0.0,
        }
    stretched = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return _doge(*size, SEED_ATTENTION, experts=options, rope_parameters=stretched)


def _recipe(size: tuple[int, int], inner: int, experts: tuple[int, int] | None = None, **fields: Any) -> FarspanConfig:
    """The published code routes across tokens; to train a new model each token is routed by itself."""
    options = None
    if experts is not None:
        options = {"num_experts": experts[0], "num_experts_per_tok": experts[1], "pool_aux_loss": True}
    tokens = {"vocab_size": 128256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return _doge(*size, {}, experts=options, **{**tokens, "intermediate_size": inner, **fields})


def _doge2() -> FarspanConfig:
    return _recipe(
        (576, 30),
        1536,
        (900, 15),
        vocab_size=49152,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
    )


PRESETS: dict[str, Preset] = {}
