"""Cottention's BERT and GPT, with cosine attention or softmax: the latter are stock BERT and GPT-J.

Source: gmongaras/Cottention_Transformer: BERT_Trainer/BertCosAttention.py, GPT_Trainer/GPTCosAttention.py;
transformers: models/bert, models/gptj.
"""

import math
from typing import Any

from farspan.errors import CheckpointError
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Copy, Entry, affine
from farspan.models.convert.settings import (
    our_activation,
    published_activation,
    published_fields,
    refuse_other,
    shared_fields,
)
from farspan.models.presets.cottention import bert_block, gptj_block

_EXPONENT = "norm_const"


def bert_self_attention_entries(heads: int, cosine: bool = True) -> list[Entry]:
    """`BertCosAttention`, which ends before the output projection: published name → ours.

    Args:
        heads: number of heads H.
        cosine: False is the stock module, without exponents.
    """
    parts = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    projections = [entry for published, ours in parts for entry in affine(published, ours)]
    return [*projections, _exponent(heads)] if cosine else projections


def bert_attention_entries(heads: int, cosine: bool = True) -> list[Entry]:
    """The attention of a BERT layer with its output projection (`attention.output.LayerNorm` is the block's)."""
    inner = [entry.under("self.", "") for entry in bert_self_attention_entries(heads, cosine)]
    return [*inner, *affine("output.dense", "o_proj")]


def gpt_attention_entries(heads: int, cosine: bool = True) -> list[Entry]:
    """`GPTCosAttention`, the attention of a GPT-J layer: published name → ours. Arguments as for BERT."""
    names = (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj"))
    projections = [Entry(f"{published}.weight", f"{ours}.weight") for published, ours in names]
    return [*projections, _exponent(heads)] if cosine else projections


def bert_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole BERT with the head that `config.architectures` names."""
    head = _architecture(config)
    heads, cosine = config.num_attention_heads, "cosine" in config.mixers
    stack: list[AnyEntry] = [
        *affine("embeddings.LayerNorm", "embed_norm"),
        Entry("embeddings.word_embeddings.weight", "embed_tokens.weight"),
        Entry("embeddings.position_embeddings.weight", "embed_positions.weight"),
        Entry("embeddings.token_type_embeddings.weight", "embed_token_types.weight"),
    ]
    layer = [
        *(entry.under("attention.", "mixer.") for entry in bert_attention_entries(heads, cosine)),
        *affine("attention.output.LayerNorm", "mixer_norm"),
        *affine("intermediate.dense", "feed_forward.up_proj"),
        *affine("output.dense", "feed_forward.down_proj"),
        *affine("output.LayerNorm", "feed_forward_norm"),
    ]
    stack += [entry.under(f"encoder.layer.{i}.", f"layers.{i}.") for i in range(len(config.mixers)) for entry in layer]
    if config.pooler:
        stack += affine("pooler.dense", "pooler")
    if head == "FarspanModel":
        return stack
    entries = [entry.under("bert.", "model.") for entry in stack]
    if head != "FarspanForMaskedLM":
        return [*entries, *affine("classifier", "classifier")]
    entries += [
        *affine("cls.predictions.transform.dense", "transform.dense"),
        *affine("cls.predictions.transform.LayerNorm", "transform.norm"),
        Entry("cls.predictions.bias", "lm_head.bias"),
        Copy("cls.predictions.decoder.bias", "lm_head.bias"),
        Copy("cls.predictions.decoder.weight", "model.embed_tokens.weight"),
    ]
    return [*entries, *(affine("cls.seq_relationship", "next_sentence_head") if config.next_sentence_head else [])]


def gpt_entries(config: FarspanConfig) -> list[AnyEntry]:
    """A whole GPT-J, with its head if `config.architectures` names it."""
    heads, cosine = config.num_attention_heads, "cosine" in config.mixers
    layer = [
        *(entry.under("attn.", "mixer.") for entry in gpt_attention_entries(heads, cosine)),
        *affine("ln_1", "mixer_norm"),
        *affine("mlp.fc_in", "feed_forward.up_proj"),
        *affine("mlp.fc_out", "feed_forward.down_proj"),
    ]
    stack: list[AnyEntry] = [
        Entry("wte.weight", "embed_tokens.weight"),
        *(entry.under(f"h.{i}.", f"layers.{i}.") for i in range(len(config.mixers)) for entry in layer),
        *affine("ln_f", "norm"),
    ]
    if _architecture(config) == "FarspanModel":
        return stack
    weight: AnyEntry = Entry("lm_head.weight", "lm_head.weight")
    if config.tie_word_embeddings:
        weight = Copy("lm_head.weight", "model.embed_tokens.weight")
    return [*(entry.under("transformer.", "model.") for entry in stack), weight, Entry("lm_head.bias", "lm_head.bias")]


def read_bert_config(published: Published) -> FarspanConfig:
    """BERT's configuration; which head there is, and whether a pooler, is told by the names."""
    config, shapes = published.config, published.shapes
    refuse_other(
        config,
        {
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "pruned_heads": ({}, None),
            "architectures": (None, *([name] for name in _BERT_CLASSES)),
        },
    )
    prefix = "" if "embeddings.word_embeddings.weight" in shapes else "bert."
    pooler = f"{prefix}pooler.dense.weight" in shapes
    head, fields = "FarspanModel", shared_fields(config)
    if "cls.predictions.bias" in shapes:
        refuse_other(config, {"tie_word_embeddings": (True,)})
        head, next_sentence = "FarspanForMaskedLM", "cls.seq_relationship.weight" in shapes
        fields |= {"lm_head_bias": True, "tie_word_embeddings": True, "next_sentence_head": next_sentence}
    elif "classifier.weight" in shapes:
        head = "FarspanForSequenceClassification" if pooler else "FarspanForTokenClassification"
        if fields.get("id2label") is None:
            fields |= {"num_labels": shapes["classifier.weight"][0]}
    positions, width = shapes[f"{prefix}embeddings.position_embeddings.weight"]
    dropout = config.get("hidden_dropout_prob", 0.1)
    layers = config.get("num_hidden_layers", published.layers(f"{prefix}encoder.layer."))
    attention = f"{prefix}encoder.layer.{{}}.attention.self.{_EXPONENT}"
    mixer, heads = _mixer(published, [attention.format(i) for i in range(layers)])
    return FarspanConfig(
        architectures=[head],
        vocab_size=config.get("vocab_size", shapes[f"{prefix}embeddings.word_embeddings.weight"][0]),
        hidden_size=config.get("hidden_size", width),
        intermediate_size=config.get(
            "intermediate_size", shapes[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0]
        ),
        num_hidden_layers=layers,
        num_attention_heads=config.get("num_attention_heads", heads or 12),
        hidden_act=our_activation(config.get("hidden_act", "gelu")),
        max_position_embeddings=config.get("max_position_embeddings", positions),
        type_vocab_size=config.get("type_vocab_size", shapes[f"{prefix}embeddings.token_type_embeddings.weight"][0]),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        embedding_dropout=dropout,
        hidden_dropout=dropout,
        pooler=pooler,
        classifier_dropout=_or(config.get("classifier_dropout"), dropout),
        initializer_range=config.get("initializer_range", 0.02),
        # The cosine module has a dropout of its own, but never applies it.
        **bert_block(mixer, config.get("attention_probs_dropout_prob", 0.1)),
        **{"pad_token_id": 0, **fields},
    )


def write_bert_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_bert_config`."""
    head = _architecture(config)
    mixer = config.mixers[0]
    masked = "BertForPreTraining" if config.next_sentence_head else "BertForMaskedLM"
    return {
        "architectures": [masked if head == "FarspanForMaskedLM" else _BERT_NAMES[head]],
        "model_type": "bert",
        "attention_type": _ATTENTION_TYPES[mixer],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": published_activation(config.hidden_act),
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.mixer_options.get(mixer, {}).get("attention_dropout", 0.0),
        "classifier_dropout": config.classifier_dropout,
        "initializer_range": config.initializer_range,
        **published_fields(config),
    }


def read_gpt_config(published: Published) -> FarspanConfig:
    """GPT-J's configuration."""
    config, shapes = published.config, published.shapes
    refuse_other(config, {"architectures": (None, ["GPTJForCausalLM"], ["GPTJModel"])})
    prefix = "" if "wte.weight" in shapes else "transformer."
    vocabulary, width = shapes[f"{prefix}wte.weight"]
    width, layers = config.get("n_embd", width), config.get("n_layer", published.layers(f"{prefix}h."))
    mixer, heads = _mixer(published, [f"{prefix}h.{i}.attn.{_EXPONENT}" for i in range(layers)])
    heads = config.get("n_head", heads or 16)
    rotary = config.get("rotary_dim", 64)
    if rotary is None:
        raise CheckpointError("config.json has rotary_dim=null; give the number of rotated channels per head.")
    return FarspanConfig(
        architectures=["FarspanForCausalLM" if prefix else "FarspanModel"],
        vocab_size=config.get("vocab_size", vocabulary),
        hidden_size=width,
        intermediate_size=_or(config.get("n_inner"), 4 * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=our_activation(config.get("activation_function", "gelu_new")),
        max_position_embeddings=config.get("n_positions", 2048),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        embedding_dropout=config.get("embd_pdrop", 0.0),
        hidden_dropout=config.get("resid_pdrop", 0.0),
        lm_head_bias=bool(prefix),
        initializer_range=config.get("initializer_range", 0.02),
        tie_word_embeddings=bool(prefix) and config.get("tie_word_embeddings", False),
        use_cache=config.get("use_cache", True),
        **gptj_block(mixer, _share(rotary, width // heads), config.get("attn_pdrop", 0.0)),
        **shared_fields(config),
    )


def write_gpt_config(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `read_gpt_config`."""
    mixer = config.mixers[0]
    options = config.mixer_options.get(mixer, {})
    head_dim = config.hidden_size // config.num_attention_heads
    return {
        "architectures": ["GPTJModel" if _architecture(config) == "FarspanModel" else "GPTJForCausalLM"],
        "model_type": "gptj",
        "attention_type": _ATTENTION_TYPES[mixer],
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "rotary_dim": round(options.get("partial_rotary_factor", 1.0) * head_dim),
        "activation_function": published_activation(config.hidden_act),
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.embedding_dropout,
        "resid_pdrop": config.hidden_dropout,
        "attn_pdrop": options.get("attention_dropout", 0.0),
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        **published_fields(config),
    }


# `attention_type` stands in the trainers' own settings, not in released configurations; it must not contradict.
_ATTENTION_TYPES = {"cosine": "cos", "softmax": "soft"}
_BERT_NAMES = {
    "FarspanModel": "BertModel",
    "FarspanForSequenceClassification": "BertForSequenceClassification",
    "FarspanForTokenClassification": "BertForTokenClassification",
}
_BERT_CLASSES = ("BertForPreTraining", "BertForMaskedLM", *_BERT_NAMES.values())
_BERT_MARKS = (
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.intermediate.dense.weight",
)
_GPT_MARKS = ("wte.weight", "h.0.attn.q_proj.weight", "h.0.attn.out_proj.weight", "h.0.mlp.fc_in.weight", "ln_f.weight")


def _looks_like(published: Published, model_type: str, prefix: str, marks: tuple[str, ...], cosine: bool) -> bool:
    """RoBERTa, without a head, has BERT's names: what says that it is something else is believed."""
    if published.config.get("model_type", model_type) != model_type:
        return False
    names = published.shapes
    known = any(all(before + mark in names for mark in marks) for before in ("", prefix))
    return known and cosine == any(name.endswith(f".{_EXPONENT}") for name in names)


def _mixer(published: Published, names: list[str]) -> tuple[str, int | None]:
    """The mixer that the presence of the exponents tells, and their number of heads.

    Raises:
        CheckpointError: if only some layers have them, or if the configuration says otherwise.
    """
    missing = [name for name in names if name not in published.shapes]
    mixer = "softmax" if len(missing) == len(names) else "cosine"
    if mixer == "cosine" and missing:
        raise CheckpointError(
            f"Cosine attention needs {_EXPONENT} in every layer; {len(missing)} of {len(names)} are missing, the first "
            f"is {missing[0]}. The checkpoint is incomplete."
        )
    claimed = published.config.get("attention_type")
    if claimed not in (None, _ATTENTION_TYPES[mixer]):
        raise CheckpointError(
            f"config.json has attention_type={claimed!r}, but the parameters "
            + (
                f"hold {_EXPONENT}, which only cosine attention has; set it to 'cos'."
                if mixer == "cosine"
                else f"hold no {_EXPONENT}: a stock class has loaded and saved it and lost them, or it is another "
                "model. Convert the original file."
            )
        )
    return mixer, published.shapes[names[0]][1] if mixer == "cosine" else None


def _architecture(config: FarspanConfig) -> str:
    return (config.architectures or ["FarspanForCausalLM"])[0]


def _exponent(heads: int) -> Entry:
    return Entry(_EXPONENT, "length_exponent", (1, heads, 1, 1), (heads,))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _share(rotary: int, head_dim: int) -> float:
    """rotary / head_dim, rounded so that head_dim times it is not below rotary."""
    share = rotary / head_dim
    return share if int(head_dim * share) == rotary else math.nextafter(share, 2.0)


def _trap(stock: str) -> str:
    return (
        f"This checkpoint says that it is a {stock}. The stock class would drop {_EXPONENT} with a mere warning and "
        "compute softmax attention with weights that were trained for cosine attention."
    )


_BERT_IGNORED = (r"(bert\.)?embeddings\.position_ids",)
_GPT_IGNORED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)",)

FAMILIES: tuple[Family, ...] = (
    Family(
        "cottention-bert",
        "Cottention BERT (cosine attention)",
        lambda published: _looks_like(published, "bert", "bert.", _BERT_MARKS, cosine=True),
        read_bert_config,
        write_bert_config,
        bert_entries,
        _BERT_IGNORED,
        _trap("BERT"),
    ),
    Family(
        "bert",
        "BERT (also Cottention's BERT with softmax)",
        lambda published: _looks_like(published, "bert", "bert.", _BERT_MARKS, cosine=False),
        read_bert_config,
        write_bert_config,
        bert_entries,
        _BERT_IGNORED,
    ),
    Family(
        "cottention-gpt",
        "Cottention GPT (cosine attention)",
        lambda published: _looks_like(published, "gptj", "transformer.", _GPT_MARKS, cosine=True),
        read_gpt_config,
        write_gpt_config,
        gpt_entries,
        _GPT_IGNORED,
        _trap("GPT-J"),
    ),
    Family(
        "gptj",
        "GPT-J (also Cottention's GPT with softmax)",
        lambda published: _looks_like(published, "gptj", "transformer.", _GPT_MARKS, cosine=False),
        read_gpt_config,
        write_gpt_config,
        gpt_entries,
        _GPT_IGNORED,
    ),
)
