"""CoCA's sizes, of both families.

Source: codefuse-ai/Collinear-Constrained-Attention: model/gpt_neox/config.json, model/llama/config.json,
model/llama/config_7b.json, and the defaults of its GPT-NeoX configuration.
"""

from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset

_SOURCE = "codefuse-ai/Collinear-Constrained-Attention, arXiv 2309.08646"
_350M = {"vocab_size": 100864, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}


def _neox(partial_rotary_factor: float, **fields: Any) -> FarspanConfig:
    options = {"partial_rotary_factor": partial_rotary_factor, "tie": "head", "attention_bias": True}
    block = {
        "mixers": ["collinear"],
        "mixer_options": {"collinear": options},
        "feed_forwards": ["mlp"],
        "feed_forward_options": {"mlp": {"bias": True}},
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "norm_eps": 1e-5,
        "use_parallel_residual": True,
    }
    return FarspanConfig(**{**block, **fields})


def _llama(**fields: Any) -> FarspanConfig:
    return FarspanConfig(mixers=["collinear"], norm_eps=1e-6, bos_token_id=1, eos_token_id=2, **fields)


PRESETS = {
    "coca-neox-350m": Preset(
        lambda: _neox(
            1.0, **_350M, num_attention_heads=16, max_position_embeddings=512, bos_token_id=100256, eos_token_id=100256
        ),
        508_880_896,
        _SOURCE,
    ),
    "coca-neox-20b": Preset(
        lambda: _neox(
            0.25,
            vocab_size=50432,
            hidden_size=6144,
            intermediate_size=24576,
            num_hidden_layers=44,
            num_attention_heads=64,
            bos_token_id=0,
            eos_token_id=2,
        ),
        20_554_567_680,
        _SOURCE,
    ),
    "coca-llama-350m": Preset(
        lambda: _llama(**_350M, num_attention_heads=16, max_position_embeddings=512, pad_token_id=100737),
        609_272_832,
        _SOURCE,
    ),
    "coca-llama-7b": Preset(
        lambda: _llama(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=2048,
        ),
        6_738_415_616,
        _SOURCE,
    ),
}
