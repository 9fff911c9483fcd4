"""Stock language models of transformers, LLaMA, Qwen3 and GPT-NeoX, as `softmax` mixers.

Source: transformers: models/llama, models/qwen3, models/gpt_neox.
"""

from collections.abc import Mapping
from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Copy, Entry, Fused, affine
from farspan.models.convert.settings import (
    first_of,
    our_activation,
    published_activation,
    published_fields,
    read_rope,
    refuse_other,
    rotated_share,
    shared_fields,
)

_WINDOWED = "sliding_softmax"


def llama_entries(config: FarspanConfig, key: str = "k_proj") -> list[AnyEntry]:
    """A whole model with LLaMA's names and the head that `config.architectures` names.

    Args:
        config: of the model; its options say which biases and norms there are.
        key: the published name of the projection that stands in a key's place, which is ours, too.
    """
    options = config.mixer_options.get(config.mixers[0], {})
    attention = _linears((("q_proj", "q_proj"), (key, key), ("v_proj", "v_proj"), ("o_proj", "o_proj")), options)
    if options.get("qk_norm"):
        attention += [Entry(f"{name}.weight", f"{name}.weight") for name in ("q_norm", "k_norm")]
    mlp = _linears(
        tuple((name, name) for name in ("gate_proj", "up_proj", "down_proj")),
        config.feed_forward_options.get("gated_mlp", {}),
    )
    layer = [
        Entry("input_layernorm.weight", "mixer_norm.weight"),
        *(entry.under("self_attn.", "mixer.") for entry in attention),
        Entry("post_attention_layernorm.weight", "feed_forward_norm.weight"),
        *(entry.under("mlp.", "feed_forward.") for entry in mlp),
    ]
    stack: list[AnyEntry] = [
        Entry("embed_tokens.weight", "embed_tokens.weight"),
        *(entry.under(f"layers.{i}.", f"layers.{i}.") for i in range(len(config.mixers)) for entry in layer),
        Entry("norm.weight", "norm.weight"),
    ]
    return _with_head(stack, config, "model.", "lm_head.weight")


def neox_entries(config: FarspanConfig, parts: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")) -> list[AnyEntry]:
    """A whole model with GPT-NeoX's names; the fused matrix holds the rows of `parts` of one head after another."""
    width, heads = config.hidden_size, config.num_attention_heads
    view = (heads, 3, width // heads)
    options = config.mixer_options.get(config.mixers[0], {})
    attention: list[AnyEntry] = [
        Fused("query_key_value.weight", tuple(f"{part}.weight" for part in parts), (*view, width), axis=1)
    ]
    if options.get("attention_bias"):
        attention.append(Fused("query_key_value.bias", tuple(f"{part}.bias" for part in parts), view, 1, vector=True))
    attention += _linears((("dense", "o_proj"),), options)
    layer: list[AnyEntry] = [
        *affine("input_layernorm", "mixer_norm"),
        *affine("post_attention_layernorm", "feed_forward_norm"),
        *(entry.under("attention.", "mixer.") for entry in attention),
        *affine("mlp.dense_h_to_4h", "feed_forward.up_proj"),
        *affine("mlp.dense_4h_to_h", "feed_forward.down_proj"),
    ]
    stack: list[AnyEntry] = [
        Entry("embed_in.weight", "embed_tokens.weight"),
        *(entry.under(f"layers.{i}.", f"layers.{i}.") for i in range(len(config.mixers)) for entry in layer),
        *affine("final_layer_norm", "norm"),
    ]
    return _with_head(stack, config, "gpt_neox.", "embed_out.weight")


def _linears(names: tuple[tuple[str, str], ...], options: Mapping[str, Any]) -> list[AnyEntry]:
    biased = options.get("attention_bias", options.get("bias", False))
    kinds = ("weight", "bias") if biased else ("weight",)
    return [Entry(f"{published}.{kind}", f"{ours}.{kind}") for published, ours in names for kind in kinds]


def _with_head(stack: list[AnyEntry], config: FarspanConfig, prefix: str, head: str) -> list[AnyEntry]:
    architecture = (config.architectures or ["FarspanForCausalLM"])[0]
    if architecture == "FarspanModel":
        return stack
    entries = [entry.under(prefix, "model.") for entry in stack]
    if architecture == "FarspanForSequenceClassification":
        return [*entries, Entry("score.weight", "classifier.weight")]
    tied = config.tie_word_embeddings
    return [*entries, Copy(head, "model.embed_tokens.weight") if tied else Entry(head, "lm_head.weight")]


_LLAMA = {"num_attention_heads": 32, "bos_token_id": 1, "eos_token_id": 2}


def llama_fields(published: Published, usual: Mapping[str, Any] = _LLAMA) -> dict[str, Any]:
    """The fields that LLaMA's configuration and its descendants' have in common, without the mixer.

    Args:
        published: the checkpoint.
        usual: what absent fields mean where models differ in it.
    """
    config, shapes, prefix = published.config, published.shapes, _prefix(published)
    vocabulary, width = shapes[f"{prefix}embed_tokens.weight"]
    heads = config.get("num_attention_heads", usual["num_attention_heads"])
    tied = config.get("tie_word_embeddings", False)
    head = "FarspanModel" if not prefix else "FarspanForCausalLM"
    fields = {name: value for name, value in usual.items() if name.endswith("_token_id")} | shared_fields(config)
    if "score.weight" in shapes:
        head, tied = "FarspanForSequenceClassification", False
        if fields.get("id2label") is None:
            fields["num_labels"] = shapes["score.weight"][0]
    bias = first_of((config,), ("mlp_bias",), f"{prefix}layers.0.mlp.gate_proj.bias" in shapes)
    return {
        "architectures": [head],
        "vocab_size": config.get("vocab_size", vocabulary),
        "hidden_size": config.get("hidden_size", width),
        "intermediate_size": config.get("intermediate_size", shapes[f"{prefix}layers.0.mlp.gate_proj.weight"][0]),
        "num_hidden_layers": config.get("num_hidden_layers", published.layers(f"{prefix}layers.")),
        "num_attention_heads": heads,
        "num_key_value_heads": first_of((config,), ("num_key_value_heads",), usual.get("num_key_value_heads")) or heads,
        "hidden_act": our_activation(config.get("hidden_act", "silu")),
        "max_position_embeddings": config.get("max_position_embeddings", usual.get("max_position_embeddings", 2048)),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "initializer_range": config.get("initializer_range", 0.02),
        "tie_word_embeddings": tied and head == "FarspanForCausalLM",
        "use_cache": config.get("use_cache", True),
        "feed_forward_options": {"gated_mlp": {"bias": True}} if bias else {},
        **fields,
    }


def _softmax_options(published: Published, prefix: str, share: float) -> dict[str, Any]:
    options: dict[str, Any] = {}
    stored = f"{prefix}layers.0.self_attn.q_proj.bias" in published.shapes
    if first_of((published.config,), ("attention_bias",), stored):
        options["attention_bias"] = True
    if dropout := published.config.get("attention_dropout", 0.0):
        options["attention_dropout"] = dropout
    if share != 1:
        options["partial_rotary_factor"] = share
    return options


def read_llama_config(published: Published) -> FarspanConfig:
    """LLaMA's configuration."""
    prefix, fields = _prefix(published), llama_fields(published)
    rope, share = read_rope(published.config)
    head_dim = published.config.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    return FarspanConfig(
        mixers=["softmax"],
        mixer_options=_given(softmax=_softmax_options(published, prefix, share)),
        head_dim=head_dim,
        rope_parameters=rope,
        **fields,
    )


def read_qwen3_config(published: Published) -> FarspanConfig:
    """Qwen3's configuration; layers with a window become `sliding_softmax` mixers."""
    config, prefix = published.config, _prefix(published)
    attention = f"{prefix}layers.0.self_attn."
    head_dim = first_of((config,), ("head_dim",), published.shapes[f"{attention}q_norm.weight"][0])
    heads, groups = (published.shapes[f"{attention}{name}.weight"][0] // head_dim for name in ("q_proj", "v_proj"))
    usual = {"num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 32768}
    fields = llama_fields(published, usual)
    rope, share = read_rope(config)
    options = {**_softmax_options(published, prefix, share), "qk_norm": True, "norm_eps": fields["norm_eps"]}
    layers = fields["num_hidden_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    for kind in kinds:
        refuse_other({"layer_types": kind}, {"layer_types": ("full_attention", "sliding_attention")})
    mixers = [_WINDOWED if kind == "sliding_attention" and window else "softmax" for kind in kinds]
    mixer_options = {"softmax": options} if "softmax" in mixers else {}
    if _WINDOWED in mixers:
        mixer_options[_WINDOWED] = {**options, "sliding_window": window}
    return FarspanConfig(
        mixers=mixers,
        mixer_options=mixer_options,
        head_dim=head_dim,
        rope_parameters=rope,
        **fields,
    )


def read_neox_config(published: Published) -> FarspanConfig:
    """GPT-NeoX's configuration."""
    fields, share = neox_fields(published)
    options: dict[str, Any] = {"attention_bias": published.config.get("attention_bias", True)}
    if dropout := published.config.get("attention_dropout", 0.0):
        options["attention_dropout"] = dropout
    if share != 1:
        options["partial_rotary_factor"] = share
    return FarspanConfig(mixers=["softmax"], mixer_options={"softmax": options}, **fields)


def neox_fields(published: Published) -> tuple[dict[str, Any], float]:
    """The fields of GPT-NeoX's configuration without the mixer, and the share of a head's channels that is rotated."""
    config, shapes = published.config, published.shapes
    prefix = "" if "embed_in.weight" in shapes else "gpt_neox."
    vocabulary, width = shapes[f"{prefix}embed_in.weight"]
    heads = config.get("num_attention_heads", 64)
    rope, share = read_rope({"rotary_pct": 0.25, **config})
    head = "FarspanForCausalLM" if prefix else "FarspanModel"
    fields = {"bos_token_id": 0, "eos_token_id": 2} | shared_fields(config)
    if "score.weight" in shapes:
        head = "FarspanForSequenceClassification"
        if fields.get("id2label") is None:
            fields["num_labels"] = shapes["score.weight"][0]
    dropout = config.get("hidden_dropout", 0.0)
    return {
        "architectures": [head],
        "vocab_size": config.get("vocab_size", vocabulary),
        "hidden_size": config.get("hidden_size", width),
        "intermediate_size": config.get("intermediate_size", shapes[f"{prefix}layers.0.mlp.dense_h_to_4h.weight"][0]),
        "num_hidden_layers": config.get("num_hidden_layers", published.layers(f"{prefix}layers.")),
        "num_attention_heads": heads,
        "feed_forwards": ["mlp"],
        "feed_forward_options": {"mlp": {"bias": True}},
        "hidden_act": our_activation(config.get("hidden_act", "gelu")),
        "hidden_dropout": dropout,
        "embedding_dropout": dropout,
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "norm_type": "layer_norm",
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "initializer_range": config.get("initializer_range", 0.02),
        "use_parallel_residual": config.get("use_parallel_residual", True),
        "rope_parameters": rope,
        "tie_word_embeddings": config.get("tie_word_embeddings", False) and head == "FarspanForCausalLM",
        "use_cache": config.get("use_cache", True),
        **fields,
    }, rotated_share(share, width // heads)


def common_settings(config: FarspanConfig, name: str) -> dict[str, Any]:
    """What LLaMA's and GPT-NeoX's `config.json` call alike; `name` is the first part of the class's name."""
    head = (config.architectures or ["FarspanForCausalLM"])[0]
    return {
        "architectures": [head.replace("FarspanFor", f"{name}For").replace("FarspanModel", f"{name}Model")],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": published_activation(config.hidden_act),
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        **published_fields(config),
    }


def write_llama_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_llama_config`."""
    options = config.mixer_options.get(config.mixers[0], {})
    rope = dict(config.rope_parameters)
    if share := options.get("partial_rotary_factor"):
        rope["partial_rotary_factor"] = share
    return {
        **common_settings(config, "Llama"),
        "model_type": "llama",
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": options.get("attention_bias", False),
        "attention_dropout": options.get("attention_dropout", 0.0),
        "mlp_bias": config.feed_forward_options.get("gated_mlp", {}).get("bias", False),
        "rope_parameters": rope,
    }


def write_qwen3_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_qwen3_config`."""
    window = config.mixer_options.get(_WINDOWED, {}).get("sliding_window")
    found = {**write_llama_config(config), **common_settings(config, "Qwen3"), "model_type": "qwen3"}
    del found["mlp_bias"]
    return found | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if mixer == _WINDOWED else "full_attention" for mixer in config.mixers],
    }


def write_neox_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_neox_config`."""
    options = config.mixer_options.get(config.mixers[0], {})
    share = options.get("partial_rotary_factor", 1.0)
    return {
        **common_settings(config, "GPTNeoX"),
        "model_type": "gpt_neox",
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": options.get("attention_dropout", 0.0),
        "attention_bias": options.get("attention_bias", False),
        "use_parallel_residual": config.use_parallel_residual,
        "rope_parameters": {**config.rope_parameters, "partial_rotary_factor": share},
    }


def _prefix(published: Published) -> str:
    return "" if "embed_tokens.weight" in published.shapes else "model."


def _given(**options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: values for name, values in options.items() if values}


def llama_like(published: Published, model_type: str, key: str = "k_proj") -> bool:
    """Whether the names are LLaMA's, with `key` in the place of the key projection, and the config says `model_type`.

    Other models share the names and differ in the maths: what the configuration says is believed.
    """
    if published.config.get("model_type", model_type) != model_type:
        return False
    attention = f"{_prefix(published)}layers.0.self_attn."
    marks = [f"{attention}{name}.weight" for name in ("q_proj", key, "v_proj", "o_proj")]
    marks += [f"{_prefix(published)}layers.0.{name}.weight" for name in ("mlp.gate_proj", "post_attention_layernorm")]
    return all(mark in published.shapes for mark in marks) and f"{attention}dt_proj.weight" not in published.shapes


def neox_like(published: Published) -> bool:
    """Whether names and configuration are GPT-NeoX's, whatever its attention is."""
    if published.config.get("model_type", "gpt_neox") != "gpt_neox":
        return False
    layers = ("layers.0.attention.query_key_value.weight", "layers.0.mlp.dense_h_to_4h.weight")
    return any(all(f"{prefix}{name}" in published.shapes for name in layers) for prefix in ("", "gpt_neox."))


def _has_norms(published: Published) -> bool:
    return f"{_prefix(published)}layers.0.self_attn.q_norm.weight" in published.shapes


def _is_stock_neox(published: Published) -> bool:
    """False only where CoCA's attention is certain; see `farspan.models.convert.coca`."""
    return neox_like(published) and published.config.get("attention_type") != "collinear"


_OLD_ROTARY = r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
# Buffers of releases of transformers before 4.35, which wrote them into checkpoints.
NEOX_IGNORED = (r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias)",)
_NEOX_ROTARY = r"(gpt_neox\.)?layers\.\d+\.attention\.rotary_emb\.inv_freq"

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "LLaMA",
        lambda published: llama_like(published, "llama") and not _has_norms(published),
        read_llama_config,
        write_llama_config,
        llama_entries,
        (_OLD_ROTARY,),
    ),
    Family(
        "qwen3",
        "Qwen3",
        lambda published: llama_like(published, "qwen3") and _has_norms(published),
        read_qwen3_config,
        write_qwen3_config,
        llama_entries,
    ),
    Family(
        "gpt_neox",
        "GPT-NeoX",
        _is_stock_neox,
        read_neox_config,
        write_neox_config,
        neox_entries,
        (*NEOX_IGNORED, _NEOX_ROTARY),
    ),
)
