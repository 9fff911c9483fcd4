"""CoCA, collinear constrained attention, in its LLaMA and its GPT-NeoX family.

Source: codefuse-ai/Collinear-Constrained-Attention: model/llama/modeling_llama.py, model/gpt_neox/modeling_gpt_neox.py.
"""

from typing import Any

from farspan.errors import CheckpointError
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Constant, Entry, Fused
from farspan.models.convert.settings import read_rope, refuse_other
from farspan.models.convert.transformers_llms import (
    NEOX_IGNORED,
    common_settings,
    llama_entries,
    llama_fields,
    llama_like,
    neox_entries,
    neox_fields,
    neox_like,
)
from farspan.nn.positions import rope_frequencies


def llama_attention_entries() -> list[AnyEntry]:
    """The attention of the LLaMA family: published name → `CollinearMixer`'s.

    A plain LLaMA has `k_proj` in the place of `t_proj`; it is refused as unknown, never taken for it.
    """
    return [Entry(f"{name}.weight", f"{name}.weight") for name in ("q_proj", "t_proj", "v_proj", "o_proj")]


def neox_attention_entries(width: int, heads: int, rotary_dim: int, rotary_base: float = 10000.0) -> list[AnyEntry]:
    """The attention of the GPT-NeoX family: published name → `CollinearMixer`'s.

    The fused matrix holds the rows q, t, v of one head after another. `inv_freq` is a buffer that a long input may have
    stretched in the published code: it is not read, and written as the configuration has it.

    Args:
        width: model width D.
        heads: number of heads H.
        rotary_dim: number of rotated channels of a head.
        rotary_base: base of the rotary frequencies.
    """
    view = (heads, 3, width // heads)
    parts = ("q_proj", "t_proj", "v_proj")
    frequencies, _ = rope_frequencies(rotary_dim, {"rope_theta": rotary_base}, 1, 1)
    return [
        Fused("query_key_value.weight", tuple(f"{part}.weight" for part in parts), (*view, width), axis=1),
        Fused("query_key_value.bias", tuple(f"{part}.bias" for part in parts), view, axis=1, vector=True),
        Entry("dense.weight", "o_proj.weight"),
        Entry("dense.bias", "o_proj.bias"),
        Constant("rotary_emb.inv_freq", frequencies),
    ]


def coca_llama_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole model of the LLaMA family."""
    return llama_entries(config, "t_proj")


def coca_neox_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole model of the GPT-NeoX family, with the frequencies that it stores in every layer."""
    channels = int(config.head_dim * config.mixer_options["collinear"]["partial_rotary_factor"])
    frequencies, _ = rope_frequencies(channels, {"rope_theta": config.rope_parameters["rope_theta"]}, 1, 1)
    buffers = [
        Constant(f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq", frequencies) for i in range(len(config.mixers))
    ]
    return [*neox_entries(config, ("q_proj", "t_proj", "v_proj")), *buffers]


def read_coca_llama_config(published: Published) -> FarspanConfig:
    """The LLaMA family's configuration.

    The released configurations give the trained length as `max_sequence_length`, a field that the published code does
    not read: it takes 2048. Here it is the trained length, to which scaled positions stretch; for the published code's
    behaviour, write `max_position_embeddings` into the configuration.

    The published code does not read `rope_theta` either, so one that is not its 10000 is refused.
    """
    config = published.config
    refuse_other(config, {"rope_theta": (10000,)})
    fields = llama_fields(published)
    if _length_by_other_name(published):
        fields["max_position_embeddings"] = config["max_sequence_length"]
    return FarspanConfig(mixers=["collinear"], rope_parameters=_rope(published), **fields)


def _length_by_other_name(published: Published) -> bool:
    return "max_sequence_length" in published.config and "max_position_embeddings" not in published.config


def _length_notes(published: Published) -> list[str]:
    if not _length_by_other_name(published):
        return []
    return [
        f"The trained length is max_sequence_length={published.config['max_sequence_length']}; the published code does "
        "not read that field and takes 2048. For its behaviour, give max_position_embeddings in config.json."
    ]


def read_coca_neox_config(published: Published) -> FarspanConfig:
    """The GPT-NeoX family's configuration."""
    _rope(published)
    fields, share = neox_fields(published)
    options = {"partial_rotary_factor": share, "tie": "head", "attention_bias": True}
    return FarspanConfig(mixers=["collinear"], mixer_options={"collinear": options}, **fields)


def _rope(published: Published) -> dict[str, Any]:
    rope, _ = read_rope(published.config)
    refuse_other({"rope_scaling": rope["rope_type"]}, {"rope_scaling": ("default", "linear", "dynamic")})
    return rope


def _scaling(config: FarspanConfig) -> dict[str, Any] | None:
    """The published form of a scaled rotation."""
    rope = config.rope_parameters
    return None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}


def write_coca_llama_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_coca_llama_config`."""
    if config.rope_parameters["rope_theta"] != 10000:
        raise CheckpointError(
            f"CoCA's LLaMA has the rotary base 10000, this model {config.rope_parameters['rope_theta']:g}."
        )
    return {
        **common_settings(config, "Llama"),
        "model_type": "llama",
        "attention_type": "collinear",
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": _scaling(config),
    }


def write_coca_neox_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_coca_neox_config`."""
    return {
        **common_settings(config, "GPTNeoX"),
        "model_type": "gpt_neox",
        # Not the published code's field: it tells this model from a stock one, whose names are the same.
        "attention_type": "collinear",
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.use_parallel_residual,
        "rotary_pct": config.mixer_options["collinear"]["partial_rotary_factor"],
        "rotary_emb_base": config.rope_parameters["rope_theta"],
        "rope_scaling": _scaling(config),
    }


def _may_be_coca_neox(published: Published) -> bool:
    """Whether a GPT-NeoX checkpoint could be CoCA's.

    Names and shapes are the stock model's. CoCA's code always stores the frequencies of every layer, and is older than
    the fields `rope_parameters` and `attention_bias` of the stock configuration. What remains can be either.
    """
    config = published.config
    if not neox_like(published):
        return False
    if config.get("attention_type") is not None:
        return config["attention_type"] == "collinear"
    stored = any(name.endswith("layers.0.attention.rotary_emb.inv_freq") for name in published.shapes)
    return stored and not {"rope_parameters", "attention_bias"} & set(config)


_TRAP = "This checkpoint says that it is a {0}. {1} would run it with ordinary attention, which it was not trained for."

FAMILIES: tuple[Family, ...] = (
    Family(
        "coca-llama",
        "CoCA on LLaMA",
        lambda published: llama_like(published, "llama", "t_proj"),
        read_coca_llama_config,
        write_coca_llama_config,
        coca_llama_entries,
        (),
        _TRAP.format("LLaMA", "The stock class leaves t_proj out, makes up a key projection and"),
        _length_notes,
    ),
    Family(
        "coca-neox",
        "CoCA on GPT-NeoX",
        _may_be_coca_neox,
        read_coca_neox_config,
        write_coca_neox_config,
        coca_neox_entries,
        NEOX_IGNORED,
        _TRAP.format("GPT-NeoX", "Its names are the stock model's, so the stock class"),
    ),
)
