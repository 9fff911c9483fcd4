"""Cottention's sizes, and the same models with softmax attention that it compares itself to.

Source: gmongaras/Cottention_Transformer: BERT_Trainer/train.py, GPT_Trainer/train.py. The 1.2B settings are those of an
earlier commit; only its context length is uncertain.
"""

from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset

_SOURCE = "gmongaras/Cottention_Transformer, arXiv 2409.18747"


def bert_block(mixer: str, attention_dropout: float = 0.0) -> dict[str, Any]:
    """The fields that make a stack a BERT, whatever its size.

    Args:
        mixer: `cosine` or `softmax`.
        attention_dropout: of the attention weights; cosine attention has none.
    """
    options: dict[str, Any] = {"attention_bias": True, "rope": False}
    return {
        **_mlp_stack(mixer, options, attention_dropout),
        "norm_place": "post",
        "position_embedding": "learned",
        "embedding_norm": True,
        "classifier_bias": True,
        "causal": False,
    }


def gptj_block(mixer: str, partial_rotary_factor: float, attention_dropout: float = 0.0) -> dict[str, Any]:
    """The fields that make a stack a GPT-J, whatever its size.

    Args:
        mixer: `cosine` or `softmax`.
        partial_rotary_factor: share of a head's channels that is rotated.
        attention_dropout: of the attention weights; cosine attention has none.
    """
    options: dict[str, Any] = {"partial_rotary_factor": partial_rotary_factor, "rope_interleaved": True}
    return {
        **_mlp_stack(mixer, options, attention_dropout),
        "use_parallel_residual": True,
        "shared_parallel_norm": True,
    }


def _mlp_stack(mixer: str, options: dict[str, Any], attention_dropout: float) -> dict[str, Any]:
    dropout = {"attention_dropout": attention_dropout} if mixer == "softmax" else {}
    return {
        "mixers": [mixer],
        "mixer_options": {mixer: options | dropout},
        "feed_forwards": ["mlp"],
        "feed_forward_options": {"mlp": {"bias": True}},
        "norm_type": "layer_norm",
    }


def _bert(mixer: str) -> FarspanConfig:
    return FarspanConfig(
        architectures=["FarspanForMaskedLM"],
        vocab_size=28996,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        type_vocab_size=2,
        hidden_act="gelu",
        norm_eps=1e-12,
        embedding_dropout=0.1,
        hidden_dropout=0.1,
        classifier_dropout=0.1,
        pooler=True,
        next_sentence_head=True,
        lm_head_bias=True,
        tie_word_embeddings=True,
        pad_token_id=0,
        **bert_block(mixer, attention_dropout=0.1),
    )


def _gpt(mixer: str, width: int, inner: int) -> FarspanConfig:
    heads, rotary = 16, 64
    return FarspanConfig(
        vocab_size=50400,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=20,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        hidden_act="gelu_tanh",
        norm_eps=1e-5,
        lm_head_bias=True,
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        **gptj_block(mixer, rotary * heads / width),
    )


PRESETS = {
    "cottention-bert-base": Preset(lambda: _bert("cosine"), 108_933_078, _SOURCE),
    "cottention-bert-base-softmax": Preset(lambda: _bert("softmax"), 108_932_934, _SOURCE),
    "cottention-gpt-300m": Preset(lambda: _gpt("cosine", 1024, 3072), 313_109_728 + 320, _SOURCE, published=True),
    "cottention-gpt-300m-softmax": Preset(lambda: _gpt("softmax", 1024, 3072), 313_109_728, _SOURCE, published=True),
    "cottention-gpt-1.2b": Preset(lambda: _gpt("cosine", 2048, 8192), 1_213_412_576 + 320, _SOURCE, published=True),
    "cottention-gpt-1.2b-softmax": Preset(lambda: _gpt("softmax", 2048, 8192), 1_213_412_576, _SOURCE, published=True),
}
