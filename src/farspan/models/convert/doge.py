"""Doge in all released forms: the seed's, small-doge's, that of transformers, and the authors' newest.

Source: LoserCheems/WonderfulMatrices: modules/dmattn.py, models/modeling_doge.py; SmallDoges/small-doge: models/doge;
transformers: models/doge; flash-algo/flash-sparse-attention: examples/modeling/modeling_doge.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from farspan.errors import CheckpointError
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.experts import cdmoe_entries, mlp_entries, seed_expert_settings, seed_feed_forwards
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Constant, Copy, Entry
from farspan.models.convert.settings import our_activation, read_rope, refuse_other, shared_fields
from farspan.models.convert.transformers_llms import common_settings
from farspan.models.presets.doge import SEED_ATTENTION, doge_block

_LINEARS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "o_proj"}
# Our names around the layers' two branches → those of the seed repository and those of transformers.
_SEED = {
    "embed_tokens.weight": "word_embed.weight",
    "norm.weight": "final_layernorm.weight",
    "mixer_norm.weight": "pre_layernorm.weight",
    "mixer_residual": "pre_residual.weight",
    "feed_forward_norm.weight": "post_layernorm.weight",
    "feed_forward_residual": "post_residual.weight",
    "feed_forward.": "feed_forward.",
    "classifier.weight": "classifier.weight",
}
_CURRENT = {
    "embed_tokens.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer_residual": "input_residual",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward_residual": "post_attention_residual",
    "feed_forward.": "mlp.",
    "classifier.weight": "score.weight",
}


def attention_entries(*, bias: bool = False, qk_norm: bool = True, biased: bool = True) -> list[Entry]:
    """The attention of every family: published name → `DynamicMaskMixer`'s.

    Args:
        bias: whether the linear layers have biases (the seed's module; `hidden_bias`, `attention_bias` elsewhere).
        qk_norm: whether there are norms of queries and keys (transformers and the newest form).
        biased: whether the dynamic bias is used; the seed's `is_causal` leaves its parameters unused.
    """
    linears = {**_LINEARS, "dt_proj": "bias_proj"} if biased else _LINEARS
    kinds = ("weight", "bias") if bias else ("weight",)
    entries = [Entry(f"{name}.{kind}", f"{ours}.{kind}") for name, ours in linears.items() for kind in kinds]
    if biased:
        entries.append(Entry("A", "bias_scale"))
    if qk_norm:
        entries += [Entry(f"{name}.weight", f"{name}.weight") for name in ("q_norm", "k_norm")]
    return entries


def attention_options(shapes: Mapping[str, tuple[int, ...]], key_width: int, prefix: str = "") -> dict[str, Any]:
    """Options of the mixer that a published attention's parameters tell: biases, norms, and heads of the bias.

    Args:
        shapes: published name → shape.
        key_width: channels per head.
        prefix: of the names of one attention, the dot included.

    Returns:
        Fields of `DynamicMaskOptions`.
    """
    key_heads = shapes[f"{prefix}k_proj.weight"][0] // key_width
    return {
        "attention_bias": f"{prefix}q_proj.bias" in shapes,
        "qk_norm": f"{prefix}q_norm.weight" in shapes,
        "bias_heads": "kv" if shapes[f"{prefix}A"][0] == key_heads else "query",
    }


def seed_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole model with the seed repository's names and the head that `config.architectures` names."""
    return _entries(config, _SEED)


def current_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole model with the names of small-doge and transformers."""
    return _entries(config, _CURRENT)


def _entries(config: FarspanConfig, names: Mapping[str, str]) -> list[AnyEntry]:
    attention = _attention(config)
    routed = "cdmoe" in config.feed_forwards
    options = config.feed_forward_options.get(config.feed_forwards[0], {})
    bias = bool(options.get("bias"))
    inner = cdmoe_entries(options.get("router", "gate"), bias) if routed else mlp_entries(bias, gated=True)
    around = ("mixer_norm.weight", "mixer_residual", "feed_forward_norm.weight", "feed_forward_residual")
    layer: list[AnyEntry] = [
        *(Entry(names[ours], ours) for ours in around),
        *(entry.under("self_attn.", "mixer.") for entry in attention),
        *(entry.under(names["feed_forward."], "feed_forward.") for entry in inner),
    ]
    stack: list[AnyEntry] = [
        *(Entry(names[ours], ours) for ours in ("embed_tokens.weight", "norm.weight")),
        *(entry.under(f"layers.{i}.", f"layers.{i}.") for i in range(len(config.mixers)) for entry in layer),
    ]
    architecture = (config.architectures or ["FarspanForCausalLM"])[0]
    if architecture == "FarspanModel":
        return stack
    entries = [entry.under("model.", "model.") for entry in stack]
    if architecture == "FarspanForSequenceClassification":
        return [*entries, Entry(names["classifier.weight"], "classifier.weight")]
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    return [*entries, Copy(head, embedding) if config.tie_word_embeddings else Entry(head, head)]


def _attention(config: FarspanConfig) -> list[AnyEntry]:
    options = config.mixer_options["dynamic_mask"]
    bias = options.get("attention_bias", False)
    biased = options.get("bias_form") != "none" or options.get("unused_bias", False)
    entries: list[AnyEntry] = [*attention_entries(bias=bias, qk_norm=options.get("qk_norm", True), biased=biased)]
    if not biased:  # The published class has the parameters of the bias without using them; ours was made without.
        assert config.num_key_value_heads is not None and config.head_dim is not None
        heads, width = config.num_attention_heads, config.num_key_value_heads * config.head_dim
        unused = {"A": (heads,), "dt_proj.weight": (heads, width), **({"dt_proj.bias": (heads,)} if bias else {})}
        entries += [Constant(name, torch.zeros(shape)) for name, shape in unused.items()]
    return entries


def _fields(published: Published, names: Mapping[str, str], tied: bool) -> tuple[dict[str, Any], str, int]:
    """The fields that all forms have in common, the prefix of the stack's names, and the channels per head."""
    config, shapes = published.config, published.shapes
    refuse_other(config, {"attention_dropout": (0, None)})
    prefix = "" if names["embed_tokens.weight"] in shapes else "model."
    vocabulary, width = shapes[f"{prefix}{names['embed_tokens.weight']}"]
    head, fields = ("FarspanForCausalLM" if prefix else "FarspanModel"), shared_fields(config)
    if names["classifier.weight"] in shapes:
        head = "FarspanForSequenceClassification"
        if fields.get("id2label") is None:
            fields["num_labels"] = shapes[names["classifier.weight"]][0]
    heads = config.get("num_attention_heads", 8)
    inner = shapes[f"{prefix}layers.0.{names['feed_forward.']}gate_proj.weight"][0]
    return (
        {
            "architectures": [head],
            "vocab_size": config.get("vocab_size", vocabulary),
            "hidden_size": config.get("hidden_size", width),
            "intermediate_size": config.get("intermediate_size", inner),
            "num_hidden_layers": config.get("num_hidden_layers", published.layers(f"{prefix}layers.")),
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "hidden_act": our_activation(config.get("hidden_act", "silu")),
            "hidden_dropout": config.get("hidden_dropout", 0.0),
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "initializer_range": config.get("initializer_range", 0.02),
            "tie_word_embeddings": config.get("tie_word_embeddings", tied) and head == "FarspanForCausalLM",
            "use_cache": config.get("use_cache", True),
            **fields,
        },
        prefix,
        config.get("head_dim") or shapes[f"{prefix}layers.0.self_attn.q_proj.weight"][0] // heads,
    )


def read_seed_config(published: Published) -> FarspanConfig:
    """The configuration of the seed repository; its defaults are those of the published class.

    Raises:
        CheckpointError: for `dynamic_mask_ratio`, which drops keys by looking at later ones.
    """
    config = published.config
    fields, prefix, head_dim = _fields(published, _SEED, tied=True)
    place = f"{prefix}layers.0.feed_forward."
    routed = f"{place}keys" in published.shapes
    refuse_other(config, {"dynamic_mask_ratio": (0, None), "is_moe": (routed,)})
    attention = {**SEED_ATTENTION, **attention_options(published.shapes, head_dim, f"{prefix}layers.0.self_attn.")}
    if config.get("is_causal", False):
        attention |= {"bias_form": "none", "bias_heads": "query", "unused_bias": True}
    inner = seed_feed_forwards(published, place, f"{place}gate_proj.bias" in published.shapes)
    # Without the field, the published class stretches positions.
    scaling = config.get("rope_scaling", {"rope_type": "dynamic", "factor": 4.0})
    return FarspanConfig(
        head_dim=head_dim,
        rope_parameters=read_rope({**config, "rope_scaling": scaling})[0],
        **{**doge_block(attention), **inner, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **fields},
    )


def read_current_config(published: Published) -> FarspanConfig:
    """The configuration of small-doge and transformers; norms and heads of the bias are told by the parameters.

    `window_size` in the place of `keep_window_size` marks the authors' newest form: a linear bias, one selection for
    all queries, and experts that each token chooses by itself. All others route across tokens; `token_mixing`, which is
    no field of theirs, says so or denies it.

    Raises:
        CheckpointError: if both windows are given.
    """
    config, shapes = published.config, published.shapes
    fields, prefix, head_dim = _fields(published, _CURRENT, tied=False)
    newest = "window_size" in config
    if newest and "keep_window_size" in config:
        raise CheckpointError(
            "config.json has keep_window_size (the form of transformers) and window_size (the newest form); remove the "
            "one that the model was not trained with."
        )
    attention = attention_options(shapes, head_dim, f"{prefix}layers.0.self_attn.")
    attention |= {"norm_eps": fields["norm_eps"], "sliding_window": config.get("sliding_window")}
    if newest:
        attention |= {"bias_form": "linear", "select": "topk_global", "keep_window_size": config["window_size"]}
    else:
        attention["keep_window_size"] = config.get("keep_window_size", 2048)
    place = f"{prefix}layers.0.mlp."
    routed = f"{place}router_gate.weight" in shapes
    refuse_other(config, {"is_moe": (routed,), "norm_topk_prob": (False, True, None)})
    experts = _gate_experts(published, place, token_mixing=not newest) if routed else None
    if experts and experts["token_mixing"]:
        attention["padding_attends"] = True  # what stands at padding then decides which experts real tokens get
    return FarspanConfig(
        head_dim=head_dim,
        rope_parameters=read_rope(config)[0],
        **doge_block(attention, experts, f"{place}gate_proj.bias" in shapes),
        **fields,
    )


def _gate_experts(published: Published, place: str, token_mixing: bool) -> dict[str, Any]:
    """Options of `cdmoe`; dividing the weights by their sum, `norm_topk_prob`, changes nothing, for it is 1."""
    config, rows = published.config, published.shapes[f"{place}down_embed.weight"][0]
    experts = math.isqrt(rows) ** 2
    balanced = config.get("output_router_logits", False)
    return {
        "num_experts": experts,
        "unreachable_experts": rows - experts,
        "num_experts_per_tok": config.get("num_experts_per_tok", 64),
        "token_mixing": config.get("token_mixing", token_mixing),
        "router_aux_loss_coef": config.get("router_aux_loss_coef", 0.001) if balanced else 0.0,
        "pool_aux_loss": True,
    }


def write_seed_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_seed_config`."""
    options = config.mixer_options["dynamic_mask"]
    return {
        **_settings(config),
        **_old_rope(config),
        "hidden_bias": options.get("attention_bias", False),
        "dynamic_mask_ratio": 0.0,
        "is_causal": options.get("bias_form") == "none",
        **seed_expert_settings(config),
    }


def write_small_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_current_config`, with rotations in the old fields."""
    found = {**write_current_config(config), **_old_rope(config)}
    del found["rope_parameters"]
    return found


def write_current_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_current_config`."""
    options = config.mixer_options["dynamic_mask"]
    inner = config.feed_forward_options.get(config.feed_forwards[0], {})
    window = "window_size" if options.get("bias_form") == "linear" else "keep_window_size"
    return {
        **_settings(config),
        "head_dim": config.head_dim,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": options.get("attention_bias", False),
        "mlp_bias": inner.get("bias", False),
        "sliding_window": options.get("sliding_window"),
        window: options.get("keep_window_size", 2048),
        **_gate_settings(config, inner),
    }


def _gate_settings(config: FarspanConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    if "cdmoe" not in config.feed_forwards:
        return {"is_moe": False}
    coefficient = options.get("router_aux_loss_coef", 0.001)
    return {
        "is_moe": True,
        "num_experts": options.get("num_experts", 16384) + options.get("unreachable_experts", 0),
        "num_experts_per_tok": options.get("num_experts_per_tok", 64),
        "token_mixing": options.get("token_mixing", False),
        "output_router_logits": coefficient > 0,
        "router_aux_loss_coef": coefficient or 0.001,
    }


def _settings(config: FarspanConfig) -> dict[str, Any]:
    return {
        **common_settings(config, "Doge"),
        "model_type": "doge",
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
    }


def _old_rope(config: FarspanConfig) -> dict[str, Any]:
    """A rotation as releases of transformers before 5 write it."""
    rope = dict(config.rope_parameters)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope}}


def _matches(published: Published, names: Mapping[str, str]) -> bool:
    marks = [names["embed_tokens.weight"]]
    marks += [f"layers.0.{name}" for name in (names["mixer_residual"], "self_attn.A", "self_attn.dt_proj.weight")]
    return any(all(f"{prefix}{mark}" in published.shapes for mark in marks) for prefix in ("", "model."))


def _current(published: Published, *, normed: bool | None = None, routed: bool) -> bool:
    """Whether the names are small-doge's and transformers', with norms of queries and keys and with experts or not."""
    layer = "layers.0." if "embed_tokens.weight" in published.shapes else "model.layers.0."
    return (
        _matches(published, _CURRENT)
        and routed == (f"{layer}mlp.router_gate.weight" in published.shapes)
        and normed in (None, f"{layer}self_attn.q_norm.weight" in published.shapes)
    )


_MIXING = (
    "The released code of Doge routes each token to its experts by the scores of other tokens of the batch, later ones "
    "included. Such models are converted as they were trained (token_mixing=true). One with the corrected router is "
    'known by window_size in its config.json, or by "token_mixing": false, which you can write there.'
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "doge-seed",
        "Doge of Wonderful Matrices",
        lambda published: _matches(published, _SEED),
        read_seed_config,
        write_seed_config,
        seed_entries,
    ),
    Family(
        "doge-small",
        "Doge of small-doge",
        lambda published: _current(published, normed=False, routed=False),
        read_current_config,
        write_small_config,
        current_entries,
    ),
    Family(
        "doge",
        "Doge of transformers",
        lambda published: _current(published, normed=True, routed=False),
        read_current_config,
        write_current_config,
        current_entries,
    ),
    Family(
        "doge-moe",
        "Doge with experts",
        lambda published: _current(published, routed=True),
        read_current_config,
        write_current_config,
        current_entries,
        traps=_MIXING,
    ),
)
