"""Doge's sizes: the first ones with and without experts, the same in the form of transformers, and later ones.

Source: LoserCheems/WonderfulMatrices: examples/; SmallDoges/small-doge: recipes/; transformers: models/doge.
"""

from collections.abc import Mapping
from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset

_SEED = "LoserCheems/WonderfulMatrices, arXiv 2412.11834"
_HF = "SmallDoges/small-doge, transformers: models/doge"
_RECIPES = "SmallDoges/small-doge: recipes"
# Width and depth of each size; the inner width is twice the former, and a head has 128 channels.
_SIZES = {"20m": (256, 8), "60m": (512, 16), "160m": (768, 24), "320m": (1024, 32)}
# Of the seed repository; transformers has the defaults of the mixer.
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


def _seed(size: str, experts: tuple[int, int, int] | None = None) -> FarspanConfig:
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
    return _doge(*_SIZES[size], SEED_ATTENTION, experts=options, rope_parameters=stretched)


def _recipe(
    width: int, depth: int, inner: int, experts: tuple[int, int] | None = None, balance: float = 0.0, **fields: Any
) -> FarspanConfig:
    """A later size, trained with a selection as wide as its context.

    The published code chooses experts across tokens; here, each token chooses by itself.
    """
    options: dict[str, Any] | None = None
    if experts is not None:
        options = dict(zip(("num_experts", "num_experts_per_tok"), experts, strict=True))
        options |= {"router_aux_loss_coef": balance, "pool_aux_loss": True}
    length = fields.setdefault("max_position_embeddings", 2048)
    tokens = {"vocab_size": 128256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    attention = {"keep_window_size": length}
    return _doge(width, depth, attention, experts=options, **{**tokens, "intermediate_size": inner, **fields})


def _doge2() -> FarspanConfig:
    return _recipe(
        576,
        30,
        1536,
        (900, 15),
        0.001,
        vocab_size=49152,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
    )


PRESETS = {
    "doge-20m": Preset(lambda: _doge(*_SIZES["20m"], {}), 13_118_728, _HF, published=True),
    "doge-60m": Preset(lambda: _doge(*_SIZES["60m"], {}), 54_571_552, _HF, published=True),
    "doge-160m": Preset(lambda: _doge(*_SIZES["160m"], {}), 152_676_168, _HF, published=True),
    "doge-320m": Preset(lambda: _doge(*_SIZES["320m"], {}), 335_750_272, _HF, published=True),
    "doge-seed-20m": Preset(lambda: _seed("20m"), 13_117_712, _SEED, published=True),
    "doge-seed-60m": Preset(lambda: _seed("60m"), 54_575_680, _SEED),
    "doge-seed-160m": Preset(lambda: _seed("160m"), 152_697_744, _SEED),
    "doge-seed-320m": Preset(lambda: _seed("320m"), 335_807_744, _SEED, published=True),
    # The first three are published rounded: 17.46M, 122.86M, 496.42M.
    "doge-seed-moe-20m": Preset(lambda: _seed("20m", (1024, 1, 2)), 17_459_472, _SEED),
    "doge-seed-moe-120m": Preset(lambda: _seed("60m", (4096, 2, 4)), 122_864_192, _SEED),
    "doge-seed-moe-480m": Preset(lambda: _seed("160m", (9216, 3, 6)), 496_417_680, _SEED),
    "doge-seed-moe-1.4b": Preset(lambda: _seed("320m", (16384, 4, 8)), 1_418_986_752, _SEED, published=True),
    "doge-40m": Preset(lambda: _recipe(256, 8, 1024), 40_709_384, _RECIPES),
    "doge-100m": Preset(lambda: _recipe(512, 16, 1536), 116_044_320, _RECIPES),
    "doge-260m": Preset(lambda: _recipe(768, 24, 2304), 268_478_280, _RECIPES),
    "doge-moe-40m": Preset(lambda: _recipe(256, 8, 1024, (1024, 8)), 45_034_760, _RECIPES),
    "doge-moe-180m": Preset(lambda: _recipe(512, 16, 1536, (4096, 16)), 184_201_760, _RECIPES),
    "doge-moe-600m": Preset(lambda: _recipe(768, 24, 2304, (9216, 24)), 611_755_848, _RECIPES),
    "doge-moe-1.6b": Preset(
        lambda: _recipe(1024, 32, 4096, (16384, 32), max_position_embeddings=4096), 1_716_987_008, _RECIPES
    ),
    "doge2-175m": Preset(_doge2, 166_711_578, _RECIPES),
}
