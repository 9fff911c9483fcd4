"""Cheems of Wonderful Matrices, and its state space duality: the module, the layer and the whole model.

Source: LoserCheems/WonderfulMatrices: modules/ssd.py, models/modeling_cheems.py.
"""

from typing import Any

from farspan.errors import CheckpointError
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.doge import attention_entries
from farspan.models.convert.experts import cdmoe_entries, mlp_entries, seed_expert_settings, seed_feed_forwards
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Copy, Entry
from farspan.models.convert.settings import (
    our_activation,
    published_activation,
    published_fields,
    read_rope,
    refuse_other,
    shared_fields,
)


def ssd_module_options(state_size: int, groups: int) -> dict[str, Any]:
    """Options of the `ssd` mixer under which it is the module `SSD(d_model, n_heads, d_state, n_groups, chunk_len)`."""
    return {"state_size": state_size, "groups": groups, "tiled_groups": True, "rope": False, "bias": True}


def ssd_module_entries() -> list[Entry]:
    """The module `SSD`: published name → ours."""
    projections = {"x_proj": "x_proj", "B_proj": "b_proj", "C_proj": "c_proj", "out_proj": "o_proj"}
    return [Entry("A_log", "decay"), Entry("D", "skip"), *_linear_entries(projections, bias=True)]


def ssd_layer_options(bias: bool = False) -> dict[str, Any]:
    """Options of the `ssd` mixer under which it is `CheemsStateSpaceDuality` with `hidden_bias=bias`."""
    return {"log_decay": False, "skip": False, "bias": bias, "dt_bias": bias, "padding_writes": True}


def ssd_layer_entries(bias: bool = False) -> list[Entry]:
    """The layer `CheemsStateSpaceDuality`: published name → ours."""
    projections = {"x_proj": "x_proj", "b_proj": "b_proj", "c_proj": "c_proj", "out_proj": "o_proj"}
    return [Entry("A", "decay"), *_linear_entries(projections, bias)]


def _linear_entries(projections: dict[str, str], bias: bool) -> list[Entry]:
    """The projections; the bias of the step size is a parameter of our mixer itself."""
    kinds = ("weight", "bias") if bias else ("weight",)
    linear = [
        Entry(f"{published}.{kind}", f"{ours}.{kind}") for published, ours in projections.items() for kind in kinds
    ]
    step = [Entry("dt_proj.weight", "dt_proj.weight"), *([Entry("dt_proj.bias", "dt_bias")] if bias else [])]
    return linear + step


def cheems_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole model with the head that `config.architectures` names."""
    bias = _biased(config)
    mixers: dict[str, list[Entry]] = {
        "ssd": [entry.under("ssd.", "mixer.") for entry in ssd_layer_entries(bias)],
        "dynamic_mask": [entry.under("attn.", "mixer.") for entry in attention_entries(bias=bias, qk_norm=False)],
    }
    routed = "cdmoe" in config.feed_forwards
    inner = cdmoe_entries("query_key", bias) if routed else mlp_entries(bias, gated=True)
    around = [
        Entry("pre_sequence_layernorm.weight", "mixer_norm.weight"),
        Entry("post_sequence_residual.weight", "mixer_residual"),
        Entry("pre_state_layernorm.weight", "feed_forward_norm.weight"),
        Entry("post_state_residual.weight", "feed_forward_residual"),
        *(entry.under("feed_forward.", "feed_forward.") for entry in inner),
    ]
    entries: list[AnyEntry] = [
        Entry("model.word_embed.weight", "model.embed_tokens.weight"),
        *(
            entry.under(f"model.layers.{i}.", f"model.layers.{i}.")
            for i, mixer in enumerate(config.mixers)
            for entry in (*mixers[mixer], *around)
        ),
        Entry("model.final_layernorm.weight", "model.norm.weight"),
    ]
    if config.architectures == ["FarspanForSequenceClassification"]:
        return [*entries, Entry("classifier.weight", "classifier.weight")]
    tied = config.tie_word_embeddings
    embedding = "model.embed_tokens.weight"
    return [*entries, Copy("lm_head.weight", embedding) if tied else Entry("lm_head.weight", "lm_head.weight")]


def read_cheems_config(published: Published) -> FarspanConfig:
    """Cheems' configuration; its defaults are those of the published class.

    A parameter A of the published state space duality is the exponent of the decay itself, +1 at initialisation, with
    which the state grows exponentially. It is taken as it is.
    """
    config, shapes = published.config, published.shapes
    refuse_other(config, {"dynamic_mask_ratio": (0, None), "attention_dropout": (0, None)})
    vocabulary, width = shapes["model.word_embed.weight"]
    layers = config.get("num_hidden_layers", published.layers("model.layers."))
    bias = "model.layers.0.feed_forward.gate_proj.bias" in shapes
    options = {
        "dynamic_mask": {
            "bias_heads": "query",
            "qk_norm": False,
            "select": "none",
            "attention_bias": bias,
            "bias_init": 1.0,
        },
        "ssd": ssd_layer_options(bias),
    }
    mixers = ["ssd" if f"model.layers.{i}.ssd.A" in shapes else "dynamic_mask" for i in range(layers)]
    head, fields = "FarspanForCausalLM", shared_fields(config)
    if "classifier.weight" in shapes:
        head = "FarspanForSequenceClassification"
        if fields.get("id2label") is None:
            fields["num_labels"] = shapes["classifier.weight"][0]
    heads = config.get("num_attention_heads", 8)
    # Without the field, the published class stretches positions.
    scaling = config.get("rope_scaling", {"rope_type": "dynamic", "factor": 4.0})
    return FarspanConfig(
        architectures=[head],
        vocab_size=config.get("vocab_size", vocabulary),
        hidden_size=config.get("hidden_size", width),
        intermediate_size=config.get("intermediate_size", shapes["model.layers.0.feed_forward.gate_proj.weight"][0]),
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        mixers=mixers,
        mixer_options={name: values for name, values in options.items() if name in mixers},
        **seed_feed_forwards(published, "model.layers.0.feed_forward.", bias),
        hidden_act=our_activation(config.get("hidden_act", "silu")),
        hidden_dropout=config.get("hidden_dropout", 0.0),
        residual_scaling="per_channel",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rope_parameters=read_rope({**config, "rope_scaling": scaling})[0],
        initializer_range=config.get("initializer_range", 0.02),
        tie_word_embeddings=config.get("tie_word_embeddings", True) and head == "FarspanForCausalLM",
        use_cache=config.get("use_cache", True),
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **fields},
    )


def write_cheems_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_cheems_config`.

    Raises:
        CheckpointError: if the layers with attention are not evenly apart.
    """
    attention = [i for i, mixer in enumerate(config.mixers) if mixer == "dynamic_mask"]
    period = attention[1] - attention[0] if len(attention) > 1 else max(len(config.mixers), 2)
    offset = attention[0] if attention else period
    if [i for i in range(len(config.mixers)) if i % period == offset] != attention:
        raise CheckpointError(
            f"Cheems has attention in every n-th layer; layers {attention} of {len(config.mixers)} are unevenly apart."
        )
    head = (config.architectures or ["FarspanForCausalLM"])[0]
    rope = dict(config.rope_parameters)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    return {
        "architectures": [head.replace("Farspan", "Cheems")],
        "model_type": "cheems",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "attn_layer_period": period,
        "attn_layer_offset": offset,
        "hidden_bias": _biased(config),
        "hidden_dropout": config.hidden_dropout,
        "hidden_act": published_activation(config.hidden_act),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope},
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        **seed_expert_settings(config),
        **published_fields(config),
    }


def _biased(config: FarspanConfig) -> bool:
    name = config.feed_forwards[0]
    return bool(config.feed_forward_options.get(name, {}).get("bias", False))


FAMILIES: tuple[Family, ...] = (
    Family(
        "cheems",
        "Cheems (Wonderful Matrices)",
        lambda published: "model.layers.0.pre_sequence_layernorm.weight" in published.shapes,
        read_cheems_config,
        write_cheems_config,
        cheems_entries,
    ),
)
