"""Published names of CoCA: attention modules of its LLaMA and GPT-NeoX families.

Source: codefuse-ai/Collinear-Constrained-Attention: model/llama/modeling_llama.py, model/gpt_neox/modeling_gpt_neox.py.
"""

from farspan.models.convert.families import Family
from farspan.models.convert.names import AnyEntry, Constant, Entry, Fused
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


FAMILIES: tuple[Family, ...] = ()
