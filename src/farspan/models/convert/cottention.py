"""Published names of Cottention: the attention modules of its BERT and of its GPT.

Source: gmongaras/Cottention_Transformer: BERT_Trainer/BertCosAttention.py, GPT_Trainer/GPTCosAttention.py.
"""

from farspan.models.convert.families import Family
from farspan.models.convert.names import Entry


def bert_self_attention_entries(heads: int) -> list[Entry]:
    """`BertCosAttention`, which ends before the output projection: published name → ours.

    Args:
        heads: number of heads H.
    """
    projections = [
        Entry(f"{published}.{kind}", f"{ours}.{kind}")
        for published, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        for kind in ("weight", "bias")
    ]
    return [*projections, _exponent(heads)]


def bert_attention_entries(heads: int) -> list[Entry]:
    """The attention of a BERT layer with its output projection (`attention.output.LayerNorm` is the block's)."""
    inner = [entry.under("self.", "") for entry in bert_self_attention_entries(heads)]
    return [*inner, *(Entry(f"output.dense.{kind}", f"o_proj.{kind}") for kind in ("weight", "bias"))]


def gpt_attention_entries(heads: int) -> list[Entry]:
    """`GPTCosAttention`, the attention of a GPT-J layer: published name → ours."""
    names = (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj"))
    return [*(Entry(f"{published}.weight", f"{ours}.weight") for published, ours in names), _exponent(heads)]


def _exponent(heads: int) -> Entry:
    return Entry("norm_const", "length_exponent", (1, heads, 1, 1), (heads,))


FAMILIES: tuple[Family, ...] = ()
