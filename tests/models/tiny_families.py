"""A tiny configuration of every published family, and a random checkpoint of each: what the converters are tested on.

`TINY` is the table: the family's name, or `name/variant` for further forms of it → its configuration. A new family adds
a line; `tests/models/test_convert.py` then converts a checkpoint of it both ways.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import farspan.models
from farspan import FarspanConfig
from farspan.models.convert import families
from farspan.models.convert.names import to_published
from farspan.models.modeling import FarspanPreTrainedModel
from farspan.models.presets.cottention import bert_block, gptj_block
from farspan.models.presets.doge import SEED_ATTENTION, doge_block
from farspan.models.presets.longnet import longnet_block
from farspan.models.presets.vision import gigapath_vision, longvit_vision

_SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _bert(mixer: str, head: str = "FarspanForMaskedLM", **fields: Any) -> FarspanConfig:
    masked = {"lm_head_bias": True, "tie_word_embeddings": True} if head == "FarspanForMaskedLM" else {}
    sizes = {
        **_SIZES,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
    }
    sizes |= {"norm_eps": 1e-12, "pad_token_id": 0}
    return FarspanConfig(**{**sizes, **bert_block(mixer), **masked, "architectures": [head], "pooler": True, **fields})


def _gptj(mixer: str, **fields: Any) -> FarspanConfig:
    sizes = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "hidden_act": "gelu_tanh"}
    head = {"norm_eps": 1e-5, "lm_head_bias": True, "architectures": ["FarspanForCausalLM"]}
    return FarspanConfig(**{**sizes, **gptj_block(mixer, 0.5), **head, **fields})


def _metala(**fields: Any) -> FarspanConfig:
    sizes = {**_SIZES, "intermediate_size": 48, "mixers": ["metala"], "architectures": ["FarspanForCausalLM"]}
    return FarspanConfig(**{**sizes, **fields})


def _longnet(**fields: Any) -> FarspanConfig:
    sizes = {**_SIZES, "intermediate_size": 48, "architectures": ["FarspanForCausalLM"]}
    return FarspanConfig(
        **{**sizes, "hidden_act": "gelu", **longnet_block([8, 16], [1, 2], positions="xpos"), **fields}
    )


def _vision(*, final_norm: bool, num_labels: int = 0, **fields: Any) -> FarspanConfig:
    sizes = {**_SIZES, "vocab_size": 0, "intermediate_size": 48, "architectures": ["FarspanForImageClassification"]}
    head = {"hidden_act": "gelu", "final_norm": final_norm, "num_labels": num_labels}
    return FarspanConfig(**{**sizes, **head, **longnet_block([8, 16], [1, 2]), **fields})


_ENCODER: dict[str, Any] = {"vocab_size": 0, "causal": False, "architectures": ["FarspanModel"]}


def _llama(mixers: list[str] | None = None, **fields: Any) -> FarspanConfig:
    sizes = {**_SIZES, "intermediate_size": 48, "architectures": ["FarspanForCausalLM"], "num_key_value_heads": 2}
    return FarspanConfig(**{**sizes, "mixers": mixers or ["softmax"], **fields})


def _qwen3(mixers: list[str], **fields: Any) -> FarspanConfig:
    options = {"qk_norm": True, "norm_eps": 1e-6}
    windows = {"sliding_softmax": {**options, "sliding_window": 5}} if "sliding_softmax" in mixers else {}
    return _llama(mixers, mixer_options={"softmax": options, **windows}, **fields)


def _neox(mixer: str, **fields: Any) -> FarspanConfig:
    tie = {"tie": "head"} if mixer == "collinear" else {}
    block = {
        "mixers": [mixer],
        "mixer_options": {mixer: {"attention_bias": True, "partial_rotary_factor": 0.5, **tie}},
        "feed_forwards": ["mlp"],
        "feed_forward_options": {"mlp": {"bias": True}},
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "norm_eps": 1e-5,
        "use_parallel_residual": True,
    }
    sizes = {**_SIZES, "intermediate_size": 48, "architectures": ["FarspanForCausalLM"]}
    return FarspanConfig(**{**sizes, **block, **fields})


def _cheems(**fields: Any) -> FarspanConfig:
    attention = {"bias_heads": "query", "qk_norm": False, "select": "none", "bias_init": 1.0}
    sizes = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "num_hidden_layers": 4}
    block = {
        "mixers": ["ssd", "dynamic_mask"],
        "mixer_options": {
            "dynamic_mask": {**attention, "attention_bias": False},
            "ssd": {"log_decay": False, "skip": False, "bias": False, "dt_bias": False, "padding_writes": True},
        },
        "residual_scaling": "per_channel",
        "architectures": ["FarspanForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return FarspanConfig(**{**sizes, **block, **fields})


_SEED_EXPERTS: dict[str, Any] = {
    "feed_forwards": ["cdmoe"],
    "feed_forward_options": {
        "cdmoe": {
            "num_experts": 16,
            "unreachable_experts": 4,
            "num_experts_per_tok": 3,
            "num_expert_heads": 2,
            "router": "query_key",
            "retrieval_size": 8,
            "router_aux_loss_coef": 0.0,
            "bias": False,
        }
    },
}


def _doge(
    attention: dict[str, Any], experts: dict[str, Any] | None = None, bias: bool = False, **fields: Any
) -> FarspanConfig:
    sizes = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "architectures": ["FarspanForCausalLM"]}
    block = doge_block({**attention, "attention_bias": bias}, experts, bias)
    return FarspanConfig(**{**sizes, "tie_word_embeddings": True, **block, **fields})


_GATE = {"num_experts": 16, "num_experts_per_tok": 4, "pool_aux_loss": True}
_SEED_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SMALL = {"keep_window_size": 8, "bias_heads": "query", "qk_norm": False}
_NEWEST = {"keep_window_size": 8, "bias_form": "linear", "select": "topk_global"}
_CLASSIFIER: dict[str, Any] = {"architectures": ["FarspanForSequenceClassification"], "num_labels": 3}

TINY: dict[str, Callable[[], FarspanConfig]] = {
    "cottention-bert": lambda: _bert("cosine", next_sentence_head=True),
    "cottention-bert/classifier": lambda: _bert("cosine", "FarspanForSequenceClassification", num_labels=3),
    "bert": lambda: _bert("softmax", next_sentence_head=True),
    "bert/tokens": lambda: _bert("softmax", "FarspanForTokenClassification", pooler=False, num_labels=5),
    "bert/stack": lambda: _bert("softmax", "FarspanModel"),
    "cottention-gpt": lambda: _gptj("cosine"),
    "gptj": lambda: _gptj("softmax"),
    "gptj/tied": lambda: _gptj("softmax", tie_word_embeddings=True),
    "metala": lambda: _metala(norm_type="simple_rms_norm"),
    "metala/tied": lambda: _metala(norm_type="simple_rms_norm", tie_word_embeddings=True),
    "metala/layer-norm": lambda: _metala(
        norm_type="layer_norm",
        norm_eps=1e-5,
        embedding_scale=32**0.5,
        feed_forward_options={"gated_mlp": {"bias": True}},
    ),
    "metala-neox": lambda: _metala(norm_type="layer_norm", norm_eps=1e-5),
    "metala-neox/tied": lambda: _metala(norm_type="neox_rms_norm", norm_eps=1e-8, tie_word_embeddings=True),
    "llama": lambda: _llama(),
    "llama/tied": lambda: _llama(
        tie_word_embeddings=True,
        mixer_options={"softmax": {"attention_bias": True}},
        feed_forward_options={"gated_mlp": {"bias": True}},
        rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "llama/classifier": lambda: _llama(**_CLASSIFIER),
    "llama/stack": lambda: _llama(architectures=["FarspanModel"]),
    "qwen3": lambda: _qwen3(["softmax"], tie_word_embeddings=True, head_dim=12),
    "qwen3/windows": lambda: _qwen3(["softmax", "sliding_softmax"]),
    "gpt_neox": lambda: _neox("softmax", hidden_dropout=0.1, embedding_dropout=0.1),
    "gpt_neox/classifier": lambda: _neox("softmax", use_parallel_residual=False, **_CLASSIFIER),
    "coca-llama": lambda: _llama(["collinear"], rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
    "coca-llama/classifier": lambda: _llama(["collinear"], **_CLASSIFIER),
    "coca-neox": lambda: _neox("collinear"),
    "cheems": lambda: _cheems(tie_word_embeddings=True),
    "cheems/experts": lambda: _cheems(**_SEED_EXPERTS),
    "doge-seed": lambda: _doge(SEED_ATTENTION, **_SEED_TOKENS, rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
    "doge-seed/experts": lambda: _doge(SEED_ATTENTION, **_SEED_TOKENS, **_SEED_EXPERTS),
    "doge-seed/classifier": lambda: _doge(
        SEED_ATTENTION, bias=True, **{**_SEED_TOKENS, **_CLASSIFIER, "tie_word_embeddings": False}
    ),
    "doge-seed/plain": lambda: _doge(
        {**SEED_ATTENTION, "bias_form": "none", "unused_bias": True}, **{**_SEED_TOKENS, "tie_word_embeddings": False}
    ),
    "doge-small": lambda: _doge(_SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0}),
    "doge": lambda: _doge(
        {"keep_window_size": 4, "sliding_window": 6}, tie_word_embeddings=False, bias=True, hidden_dropout=0.1
    ),
    "doge/classifier": lambda: _doge({}, head_dim=12, **{**_CLASSIFIER, "tie_word_embeddings": False}),
    "doge/stack": lambda: _doge({}, architectures=["FarspanModel"], tie_word_embeddings=False),
    "doge/newest": lambda: _doge(_NEWEST),
    "doge-moe": lambda: _doge({"padding_attends": True}, {**_GATE, "token_mixing": True, "router_aux_loss_coef": 0.0}),
    "doge-moe/balanced": lambda: _doge(_SMALL, {**_GATE, "unreachable_experts": 1, "router_aux_loss_coef": 0.1}),
    "doge-moe/newest": lambda: _doge(_NEWEST, _GATE, tie_word_embeddings=False),
    "longnet-decoder": lambda: _longnet(),
    "longnet-decoder/deepnorm": lambda: _longnet(
        **longnet_block([8, 16], [1, 3], norm_place="pre", sub_norm=False, norm_eps=1e-6),
        residual_scaling="deepnorm",
        position_embedding="learned",
        position_embedding_offset=2,
        max_position_embeddings=64,
        embedding_norm=True,
        embedding_scale=32**0.5,
        tie_word_embeddings=True,
    ),
    "longnet-encoder": lambda: _longnet(**_ENCODER),
    "longnet-encoder/deepnorm": lambda: _longnet(
        **longnet_block([8], [2], norm_place="post", sub_norm=False), residual_scaling="deepnorm", **_ENCODER
    ),
    "longvit": lambda: _vision(final_norm=False, num_labels=3, **longvit_vision(32, 8, pooled_norm=True)),
    "longvit/backbone": lambda: _vision(final_norm=False, **longvit_vision(32, 8, pooled_norm=False)),
    "gigapath": lambda: _vision(final_norm=True, **gigapath_vision(24)),
    "gigapath/mean": lambda: _vision(final_norm=True, **gigapath_vision(24, grid_size=9, mean=True)),
}


def family_of(case: str) -> families.Family:
    """The family of a name in `TINY`."""
    return families.get(case.partition("/")[0])


def tiny_model(case: str) -> FarspanPreTrainedModel:
    """A model of a name in `TINY`, in evaluation mode, with no parameter left at a value that hides a mistake."""
    torch.manual_seed(0)
    config = TINY[case]()
    assert config.architectures is not None
    model = getattr(farspan.models, config.architectures[0])(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def own_state(model: FarspanPreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model that its files hold: a tied head is the embedding."""
    return {name: x for name, x in model.state_dict().items() if name not in model.all_tied_weights_keys}


def published_checkpoint(
    case: str, dtype: torch.dtype = torch.float32
) -> tuple[FarspanPreTrainedModel, dict[str, Any], dict[str, Tensor]]:
    """A model, and the config.json and the tensors that its authors would have published for it."""
    family, model = family_of(case), tiny_model(case).to(dtype)
    state = to_published(own_state(model), family.entries(model.config))
    return model, family.write_config(model.config), {name: x.clone().contiguous() for name, x in state.items()}


def save_published(directory: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """Saves a checkpoint as one safetensors file with its config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
