"""Tiny models of every mix that the tests here run on."""

import pytest
import torch

from farspan import FarspanConfig, FarspanForCausalLM

MIXES = {
    "collinear": {"mixers": ["collinear"]},
    "collinear_strict": {
        "mixers": ["collinear"],
        "mixer_options": {"collinear": {"form": "strict", "partial_rotary_factor": 0.5, "attention_bias": True}},
    },
    "collinear_window": {
        "mixers": ["collinear"],
        "mixer_options": {"collinear": {"sliding_window": 4, "partial_rotary_factor": 0.5, "tie": "head"}},
    },
    "collinear_near": {"mixers": ["collinear"], "mixer_options": {"collinear": {"sliding_window": 4}}},
    "cosine": {"mixers": ["cosine"]},
    "cosine_gpt": {
        "mixers": ["cosine"],
        "mixer_options": {"cosine": {"rope_interleaved": True, "partial_rotary_factor": 0.5, "attention_bias": True}},
    },
    "dilated": {
        "mixers": ["dilated"],
        "mixer_options": {"dilated": {"segment_lengths": [3, 8, 16], "dilations": [1, 2, 3]}},
    },
    "dilated_nested": {
        "mixers": ["dilated"],
        "mixer_options": {
            "dilated": {"segment_lengths": [4, 8], "dilations": [1, 2], "positions": "xpos", "xpos_scale_base": 16.0}
        },
    },
    "dilated_xpos": {
        "mixers": ["dilated"],
        "mixer_options": {
            "dilated": {
                "segment_lengths": [5, 8],
                "dilations": [2, 3],
                "head_offset": "block",
                "positions": "xpos+relative_bias",
                "xpos_scale_base": 16.0,
                "qk_norm": "rms_norm",
                "multi_query": True,
                "attention_bias": True,
                "sub_norm": True,
            }
        },
    },
    "dynamic_mask": {
        "mixers": ["dynamic_mask"],
        "mixer_options": {"dynamic_mask": {"keep_window_size": 4}},
    },
    "dynamic_mask_query": {
        "mixers": ["dynamic_mask"],
        "mixer_options": {
            "dynamic_mask": {
                "keep_window_size": 3,
                "bias_heads": "query",
                "bias_form": "linear",
                "qk_norm": False,
                "attention_bias": True,
            }
        },
    },
    "dynamic_mask_relu": {
        "mixers": ["dynamic_mask"],
        "mixer_options": {"dynamic_mask": {"select": "relu", "bias_form": "linear", "rope": False}},
    },
    "dynamic_mask_window": {
        "mixers": ["dynamic_mask"],
        "mixer_options": {"dynamic_mask": {"keep_window_size": 3, "sliding_window": 6}},
    },
    "metala": {"mixers": ["metala"]},
    "softmax": {"mixers": ["softmax"]},
    "hybrid": {"mixers": ["metala", "metala", "softmax"]},
    "hybrid_parallel": {
        "mixers": ["cosine", "cosine", "softmax"],
        "use_parallel_residual": True,
        "norm_type": "layer_norm",
        "lm_head_bias": True,
    },
    "softmax_post_norm": {
        "mixers": ["softmax"],
        "mixer_options": {"softmax": {"rope": False, "qk_norm": True}},
        "norm_place": "post",
        "residual_scaling": "deepnorm",
        "norm_type": "layer_norm",
        "position_embedding": "learned",
        "position_embedding_offset": 2,
        "max_position_embeddings": 512,
        "embedding_norm": True,
        "type_vocab_size": 2,
    },
    "window": {"mixers": ["softmax"], "mixer_options": {"softmax": {"sliding_window": 4}}},
    "ssd": {"mixers": ["ssd"]},
    "ssd_grouped": {
        "mixers": ["ssd"],
        "mixer_options": {"ssd": {"groups": 2, "state_size": 6, "conv_size": 3, "gated_norm": True, "bias": True}},
    },
}


def tiny(mix: str, **overrides: object) -> FarspanForCausalLM:
    """A model of `mix` in evaluation mode with every zero-initialised parameter perturbed."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    model = FarspanForCausalLM(FarspanConfig(**{**fields, **MIXES[mix], **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(params=sorted(MIXES))
def mix(request: pytest.FixtureRequest) -> str:
    return request.param
