"""LongNet as torchscale builds it: the decoder that models language, and the encoder.

Source: microsoft/torchscale: torchscale/model/LongNet.py, architecture/decoder.py, architecture/encoder.py,
architecture/config.py, component/dilated_attention.py, component/multihead_attention.py, component/embedding.py.
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from farspan.errors import CheckpointError
from farspan.mixers.base import MIXERS
from farspan.mixers.dilated import DilatedOptions
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Constant, Copy, Entry, affine
from farspan.models.convert.settings import our_activation, published_fields, refuse_other, shared_fields
from farspan.models.presets.longnet import TORCHSCALE, longnet_block
from farspan.nn.positions import xpos_scales

_PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
# fairseq's tables of positions begin with two rows that no token uses.
_OFFSET = 2


def attention_entries(head_dim: int, xpos: bool = False, sub_norm: bool = False) -> list[AnyEntry]:
    """The token mixer (`DilatedAttention`): published name → `DilatedMixer`'s.

    Args:
        head_dim: channels per head K.
        xpos: whether there is xPos, whose scales are published as a buffer.
        sub_norm: whether there is an inner LayerNorm.
    """
    modules = _PROJECTIONS | ({"inner_attn_ln": "sub_norm"} if sub_norm else {})
    entries: list[AnyEntry] = [entry for published, ours in modules.items() for entry in affine(published, ours)]
    if xpos:
        entries.append(Constant("xpos.scale", xpos_scales(head_dim).float()))
    return entries


def relative_bias_entries() -> list[AnyEntry]:
    """The table of relative biases (`RelativePositionBias`, published beside the layers): published name → ours."""
    return [Entry("relative_attention_bias.weight", "relative_bias")]


def layers_entries(config: FarspanConfig) -> list[AnyEntry]:
    """All layers of a decoder or an encoder, which have the same names."""
    options = _options(config)
    sub_norm, xpos = options.sub_norm, options.positions == "xpos"
    head_dim = config.hidden_size // config.num_attention_heads
    layer = [
        *(entry.under("self_attn.", "mixer.") for entry in attention_entries(head_dim, xpos, sub_norm)),
        *affine("self_attn_layer_norm", "mixer_norm"),
        *affine("ffn.fc1", "feed_forward.up_proj"),
        *affine("ffn.fc2", "feed_forward.down_proj"),
        *(affine("ffn.ffn_layernorm", "feed_forward.sub_norm") if sub_norm else []),
        *affine("final_layer_norm", "feed_forward_norm"),
    ]
    return [entry.under(f"layers.{i}.", f"layers.{i}.") for i in range(len(config.mixers)) for entry in layer]


def entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole decoder or encoder, with its head if `config.architectures` names a language model."""
    stack = layers_entries(config)
    if config.vocab_size:
        stack.append(Entry("embed_tokens.weight", "embed_tokens.weight"))
    if config.position_embedding == "learned":
        stack.append(Entry("embed_positions.weight", "embed_positions.weight"))
    if config.embedding_norm:
        stack += affine("layernorm_embedding", "embed_norm")
    if config.final_norm:
        stack += affine("layer_norm", "norm")
    if config.architectures == ["FarspanModel"]:
        return stack
    head: AnyEntry = Entry("output_projection.weight", "lm_head.weight")
    if config.tie_word_embeddings:
        head = Copy("output_projection.weight", "model.embed_tokens.weight")
    return [*(entry.under("", "model.") for entry in stack), head]


def read_block(settings: Mapping[str, Any], before: bool) -> dict[str, Any]:
    """The fields that a torchscale configuration says of every layer.

    Args:
        settings: torchscale's configuration.
        before: whether the norms stand before the branches.

    Raises:
        CheckpointError: for settings that change the result and that dilated attention does not have.
    """
    refuse_other(
        settings,
        {
            # torchscale itself fails where dilated attention meets a relative bias.
            "rel_pos_buckets": (0,),
            "max_rel_pos": (0,),
            "multiway": (False,),
            "moe_freq": (0,),
            "activation_fn": ("gelu", "relu", "swish"),
            "activation_dropout": (0,),
        },
    )
    deepnorm, dropout = settings.get("deepnorm", False), settings.get("dropout", 0.0)
    sub_norm = settings.get("subln", True) and not deepnorm
    return {
        **longnet_block(
            _numbers(settings, "segment_length"),
            _numbers(settings, "dilated_ratio"),
            norm_place="post" if not before else "sub" if sub_norm else "pre",
            sub_norm=sub_norm,
            positions="xpos" if settings.get("xpos_rel_pos", False) else "none",
            norm_eps=settings.get("layernorm_eps", 1e-5),
            attention_dropout=settings.get("attention_dropout", 0.0),
            xpos_scale_base=float(settings.get("xpos_scale_base", 512)),
        ),
        "residual_scaling": "deepnorm" if deepnorm else "none",
        "hidden_act": our_activation(settings.get("activation_fn", "gelu")),
        "embedding_dropout": dropout,
        "hidden_dropout": dropout,
        "drop_path_rate": settings.get("drop_path_rate", 0.0),
    }


def write_block(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_block`, but for the place of the norms.

    Raises:
        CheckpointError: for a model that torchscale has not.
    """
    options = _options(config)
    if any(getattr(options, name) != value for name, value in TORCHSCALE.items()):
        wanted = ", ".join(f"{name}={value!r}" for name, value in TORCHSCALE.items())
        raise CheckpointError(
            f"torchscale computes dilated attention with {wanted} alone; this model has other options and cannot be "
            "written in that form."
        )
    return {
        "segment_length": options.segment_lengths,
        "dilated_ratio": options.dilations,
        "flash_attention": True,
        "xpos_rel_pos": options.positions == "xpos",
        "xpos_scale_base": options.xpos_scale_base,
        "subln": options.sub_norm,
        "deepnorm": config.residual_scaling == "deepnorm",
        "layernorm_eps": config.norm_eps,
        "activation_fn": "swish" if config.hidden_act == "silu" else config.hidden_act,
        "dropout": config.hidden_dropout,
        "attention_dropout": options.attention_dropout,
        "drop_path_rate": config.drop_path_rate,
    }


def _options(config: FarspanConfig) -> DilatedOptions:
    options: DilatedOptions = MIXERS.build_options("dilated", config.mixer_options["dilated"])
    return options


def _numbers(settings: Mapping[str, Any], name: str) -> list[int]:
    """A list of integers, which torchscale also takes as text (and evaluates; here it is read as JSON)."""
    value = settings.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = settings[name]
    if not isinstance(value, list) or not value or not all(type(x) is int for x in value):
        raise CheckpointError(
            f"config.json has {name}={value!r}; give segment_length and dilated_ratio, the patterns of the dilated "
            "attention, as lists of integers: no parameter tells them."
        )
    return value


def _read(published: Published, kind: str) -> FarspanConfig:
    config, shapes = published.config, published.shapes
    decoder = kind == "decoder"
    before = config.get(f"{kind}_normalize_before", config.get("normalize_before", True))
    if decoder:
        # `deepnorm` resets the flag of the encoder alone there: only the parameters tell what such a decoder is.
        before = "layer_norm.weight" in shapes
    elif config.get("deepnorm", False):
        before = False
    elif config.get("subln", True):
        before = True
    learned = "embed_positions.weight" in shapes
    limit = "max_target_positions" if decoder else "max_source_positions"
    width = config.get(f"{kind}_embed_dim", shapes["layers.0.self_attn_layer_norm.weight"][0])
    tied = config.get(f"share_{kind}_input_output_embed", False)
    head = "output_projection.weight" in shapes or (tied and decoder)
    if head and not decoder:
        raise CheckpointError(
            "This LongNet encoder has an output_projection, for which Farspan has no head; remove it."
        )
    return FarspanConfig(
        architectures=["FarspanForCausalLM" if head else "FarspanModel"],
        vocab_size=shapes.get("embed_tokens.weight", (0,))[0],
        hidden_size=width,
        intermediate_size=config.get(f"{kind}_ffn_embed_dim", shapes["layers.0.ffn.fc1.weight"][0]),
        num_hidden_layers=config.get(f"{kind}_layers", published.layers("layers.")),
        num_attention_heads=config.get(f"{kind}_attention_heads", 12),
        **read_block(config, before),
        final_norm="layer_norm.weight" in shapes,
        position_embedding="learned" if learned else "none",
        position_embedding_offset=_OFFSET if learned else 0,
        max_position_embeddings=shapes["embed_positions.weight"][0] - _OFFSET if learned else config.get(limit, 1024),
        embedding_scale=1.0 if config.get("no_scale_embedding", True) else math.sqrt(width),
        embedding_norm="layernorm_embedding.weight" in shapes,
        causal=decoder,
        tie_word_embeddings=head and tied,
        initializer_range=config.get("initializer_range", 0.02),
        **shared_fields(config),
    )


def _write(config: FarspanConfig, kind: str) -> dict[str, Any]:
    learned = config.position_embedding == "learned"
    limit = "max_target_positions" if kind == "decoder" else "max_source_positions"
    return {
        "vocab_size": config.vocab_size or -1,
        f"{kind}_embed_dim": config.hidden_size,
        f"{kind}_ffn_embed_dim": config.intermediate_size,
        f"{kind}_layers": config.num_hidden_layers,
        f"{kind}_attention_heads": config.num_attention_heads,
        f"{kind}_normalize_before": config.norm_place != "post",
        "normalize_output": config.final_norm,
        **write_block(config),
        limit: config.max_position_embeddings + (_OFFSET if learned else 0),
        "no_scale_embedding": config.embedding_scale == 1,
        "layernorm_embedding": config.embedding_norm,
        f"share_{kind}_input_output_embed": config.tie_word_embeddings,
        "no_output_layer": config.architectures == ["FarspanModel"],
        "initializer_range": config.initializer_range,
        **published_fields(config),
    }


_MARKS = ("layers.0.self_attn.out_proj.weight", "layers.0.self_attn_layer_norm.weight", "layers.0.ffn.fc1.weight")


def _matches(published: Published, kind: str) -> bool:
    """Decoder and encoder have the same names: the configuration tells, or it is left open."""
    other = "encoder" if kind == "decoder" else "decoder"
    possible = kind == "encoder" or "embed_tokens.weight" in published.shapes
    return (
        possible and all(mark in published.shapes for mark in _MARKS) and f"{other}_embed_dim" not in published.config
    )


FAMILIES: tuple[Family, ...] = tuple(
    Family(
        f"longnet-{kind}",
        f"LongNet {kind} (torchscale)",
        functools.partial(_matches, kind=kind),
        functools.partial(_read, kind=kind),
        functools.partial(_write, kind=kind),
        entries,
    )
    for kind in ("decoder", "encoder")
)
