"""MetaLA: the Hugging Face style model, and the one trained with GPT-NeoX.

Source: BICLab/MetaLA: metala/modeling_metala.py, metala/configuration_metala.py, gpt-neox/metala_qv_selfaug.py;
EleutherAI/gpt-neox: megatron/model/gpt2_model.py (names around the layers).
"""

import math
from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Entry, affine
from farspan.models.convert.settings import our_activation, published_fields, refuse_other, shared_fields


def mixer_entries(width: int, heads: int, key_dim: int, conv_size: int = 4) -> list[Entry]:
    """The token mixer (`QVMetaLA_self_aug`, `ParallelMetaLA_Attention_selfaug`): published name → ours.

    Args:
        width: model width D.
        heads: number of heads H.
        key_dim: query and decay width over all heads.
        conv_size: width of the short convolution.
    """
    return [
        Entry("q_proj.weight", "q_proj.weight"),
        Entry("k_gate.weight", "decay_proj.weight"),
        Entry("v_proj.weight", "v_proj.weight"),
        *affine("g_proj", "gate_proj"),
        Entry("out_proj.weight", "o_proj.weight"),
        Entry("aug_balance", "augmentation", (key_dim,), (heads, key_dim // heads)),
        Entry("conv1d.weight", "convolution", (width, 1, conv_size), (width, conv_size)),
    ]


def neox_layer_entries(width: int, heads: int, key_dim: int, norm_type: str = "layer_norm") -> list[Entry]:
    """A whole layer of the GPT-NeoX style code: published name → `FarspanBlock`'s.

    Args:
        width, heads, key_dim: as for `mixer_entries`.
        norm_type: `layer_norm` (weight and bias) or `neox_rms_norm` (whose weight is published as `scale`).
    """
    return [
        *_neox_norm("input_layernorm", "mixer_norm", norm_type),
        *_neox_norm("post_attention_layernorm", "feed_forward_norm", norm_type),
        *(entry.under("attention.", "mixer.") for entry in mixer_entries(width, heads, key_dim)),
        Entry("mlp.w1.weight", "feed_forward.gate_proj.weight"),
        Entry("mlp.w3.weight", "feed_forward.up_proj.weight"),
        Entry("mlp.w2.weight", "feed_forward.down_proj.weight"),
    ]


def _neox_norm(published: str, ours: str, norm_type: str) -> list[Entry]:
    if norm_type == "layer_norm":
        return affine(published, ours)
    return [Entry(f"{published}.scale", f"{ours}.weight")]


def hf_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole model of the Hugging Face style code; a tied head is not stored."""
    width, heads = config.hidden_size, config.num_attention_heads
    normed = config.norm_type == "layer_norm"
    layer = [entry.under("token_mixer.", "mixer.") for entry in mixer_entries(width, heads, width // 2)]
    kinds = ("weight", "bias") if _bias(config) else ("weight",)
    for published, ours in (("l1", "gate_proj"), ("l2", "up_proj"), ("l3", "down_proj")):
        layer += [Entry(f"channel_mixer.{published}.{kind}", f"feed_forward.{ours}.{kind}") for kind in kinds]
    if normed:
        layer += [*affine("token_norm", "mixer_norm"), *affine("channel_norm", "feed_forward_norm")]
    return [
        Entry("model.embed_tokens.weight", "model.embed_tokens.weight"),
        *(_numbered("model.layers.", i, i, entry) for i in range(len(config.mixers)) for entry in layer),
        *(affine("model.final_norm", "model.norm") if normed else []),
        *([] if config.tie_word_embeddings else [Entry("lm_head.weight", "lm_head.weight")]),
    ]


def neox_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole model of the GPT-NeoX style code, as `GPT2ModelPipe.to_sequential()` stores it.

    Place 0 holds the embedding, 1 a transposition, then come the layers, another transposition, the last norm and,
    unless it is tied, the head.
    """
    layers, width, heads = len(config.mixers), config.hidden_size, config.num_attention_heads
    layer = neox_layer_entries(width, heads, width // 2, config.norm_type)
    norm = _neox_norm(f"sequential.{layers + 3}.norm", "model.norm", config.norm_type)
    head = Entry(f"sequential.{layers + 4}.final_linear.weight", "lm_head.weight")
    return [
        Entry("sequential.0.word_embeddings.weight", "model.embed_tokens.weight"),
        *(_numbered("sequential.", i + 2, i, entry) for i in range(layers) for entry in layer),
        *norm,
        *([] if config.tie_word_embeddings else [head]),
    ]


def _numbered(prefix: str, published: int, ours: int, entry: Entry) -> Entry:
    return entry.under(f"{prefix}{published}.", f"model.layers.{ours}.")


def _bias(config: FarspanConfig) -> bool:
    return config.feed_forward_options.get("gated_mlp", {}).get("bias", False)


def read_hf_config(published: Published) -> FarspanConfig:
    """The configuration of the Hugging Face style code.

    Whether the head is tied is told by its absence: `tie_word_embeddings` ties in some versions of transformers and
    not in others, and the published class names no tied parameters.
    """
    config, shapes = published.config, published.shapes
    refuse_other(config, {"glu_act": ("silu", "swish", "gelu", "relu", "sigmoid"), "causal": (True,)})
    vocabulary, width = shapes["model.embed_tokens.weight"]
    width, inner = config.get("decoder_embed_dim", width), config.get("glu_dim", _glu_width(published, "l1"))
    # As the published code, which takes any other name for a LayerNorm.
    simple = config.get("norm_type", "simplermsnorm") == "simplermsnorm"
    return FarspanConfig(
        architectures=["FarspanForCausalLM"],
        vocab_size=config.get("vocab_size", vocabulary),
        hidden_size=width,
        intermediate_size=width if inner == -1 else inner,
        num_hidden_layers=config.get("decoder_layers", published.layers("model.layers.")),
        num_attention_heads=config.get("decoder_attention_heads", 8),
        mixers=["metala"],
        feed_forward_options={"gated_mlp": {"bias": True}} if config.get("bias", False) else {},
        hidden_act=our_activation(config.get("glu_act", "silu")),
        norm_type="simple_rms_norm" if simple else "layer_norm",
        norm_eps=1e-6 if simple else 1e-5,
        embedding_scale=1.0 if config.get("no_scale_embedding", True) else math.sqrt(width),
        initializer_range=config.get("init_std", 0.02),
        tie_word_embeddings="lm_head.weight" not in shapes,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        use_cache=config.get("use_cache", True),
        **{"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, **shared_fields(config)},
    )


def write_hf_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_hf_config`."""
    return {
        "architectures": ["MetaLAForCausalLM"],
        "model_type": "metala",
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.hidden_size,
        "decoder_layers": config.num_hidden_layers,
        "decoder_attention_heads": config.num_attention_heads,
        "glu_dim": config.intermediate_size,
        "glu_act": config.hidden_act,
        "bias": _bias(config),
        "norm_type": "simplermsnorm" if config.norm_type == "simple_rms_norm" else "layernorm",
        "no_scale_embedding": config.embedding_scale == 1,
        "init_std": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "use_cache": config.use_cache,
        **published_fields(config),
    }


def read_neox_config(published: Published) -> FarspanConfig:
    """The configuration of the GPT-NeoX style code: its arguments, with underscores, as a `config.json`."""
    config, shapes = published.config, published.shapes
    refuse_other(
        config,
        {
            "activation": ("silu", "swish", "gelu", "relu"),
            "norm": ("layernorm", "rmsnorm"),
            "pos_emb": ("none", "rotary", "alibi"),  # the last two would act inside of an attention that is not there
            "gpt_j_residual": (False,),
            "use_mup": (False,),
            "hidden_dropout": (0,),  # it acts on one of the two branches alone
        },
    )
    vocabulary, width = shapes["sequential.0.word_embeddings.weight"]
    layers = config.get("num_layers", sum(name.endswith(".attention.k_gate.weight") for name in shapes))
    layer_norm = config.get("norm", "layernorm") == "layernorm"
    eps = config.get("layernorm_epsilon", 1e-5) if layer_norm else config.get("rms_norm_epsilon", 1e-8)
    return FarspanConfig(
        architectures=["FarspanForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=config.get("hidden_size", width),
        intermediate_size=_glu_width(published, "w1"),
        num_hidden_layers=layers,
        num_attention_heads=config.get("num_attention_heads", 8),
        mixers=["metala"],
        hidden_act=our_activation(config.get("activation", "gelu")),
        norm_type="layer_norm" if layer_norm else "neox_rms_norm",
        norm_eps=eps,
        initializer_range=config.get("init_method_std", 0.02),
        tie_word_embeddings=f"sequential.{layers + 4}.final_linear.weight" not in shapes,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        **shared_fields(config),
    )


def write_neox_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_neox_config`."""
    layer_norm = config.norm_type == "layer_norm"
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "activation": config.hidden_act,
        "norm": "layernorm" if layer_norm else "rmsnorm",
        "layernorm_epsilon" if layer_norm else "rms_norm_epsilon": config.norm_eps,
        "init_method_std": config.initializer_range,
        "no_weight_tying": not config.tie_word_embeddings,
        "pos_emb": "none",
        "max_position_embeddings": config.max_position_embeddings,
        **published_fields(config),
    }


def _glu_width(published: Published, projection: str) -> int:
    """Rows of a projection into the channel mixer; every layer has the same."""
    return next(shape[0] for name, shape in published.shapes.items() if name.endswith(f".{projection}.weight"))


FAMILIES: tuple[Family, ...] = (
    Family(
        "metala",
        "MetaLA (Hugging Face style)",
        lambda published: "model.layers.0.token_mixer.k_gate.weight" in published.shapes,
        read_hf_config,
        write_hf_config,
        hf_entries,
    ),
    Family(
        "metala-neox",
        "MetaLA (GPT-NeoX style)",
        lambda published: "sequential.2.attention.k_gate.weight" in published.shapes,
        read_neox_config,
        write_neox_config,
        neox_entries,
    ),
)
