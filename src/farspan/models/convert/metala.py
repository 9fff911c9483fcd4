"""Published names of MetaLA: the Hugging Face style mixer and the GPT-NeoX style layer.

Source: BICLab/MetaLA: metala/modeling_metala.py, gpt-neox/metala_qv_selfaug.py.
"""

from farspan.models.convert.families import Family
from farspan.models.convert.names import Entry


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
        Entry("g_proj.weight", "gate_proj.weight"),
        Entry("g_proj.bias", "gate_proj.bias"),
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
    kinds = {"weight": "weight", "bias": "bias"} if norm_type == "layer_norm" else {"scale": "weight"}
    norms = [
        Entry(f"{published}.{kind}", f"{ours}.{our_kind}")
        for published, ours in (("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "feed_forward_norm"))
        for kind, our_kind in kinds.items()
    ]
    feed_forward = [
        Entry("mlp.w1.weight", "feed_forward.gate_proj.weight"),
        Entry("mlp.w3.weight", "feed_forward.up_proj.weight"),
        Entry("mlp.w2.weight", "feed_forward.down_proj.weight"),
    ]
    mixer = [entry.under("attention.", "mixer.") for entry in mixer_entries(width, heads, key_dim)]
    return [*norms, *mixer, *feed_forward]


FAMILIES: tuple[Family, ...] = ()
