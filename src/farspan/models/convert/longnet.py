"""Published names of LongNet's dilated attention (torchscale).

Source: microsoft/torchscale: torchscale/component/dilated_attention.py, multihead_attention.py.
"""

from farspan.models.convert.families import Family
from farspan.models.convert.names import AnyEntry, Constant, Entry
from farspan.nn.positions import xpos_scales

_PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}


def attention_entries(head_dim: int, xpos: bool = False, sub_norm: bool = False) -> list[AnyEntry]:
    """The token mixer (`DilatedAttention`): published name → `DilatedMixer`'s.

    Args:
        head_dim: channels per head K.
        xpos: whether there is xPos, whose scales are published as a buffer.
        sub_norm: whether there is an inner LayerNorm.
    """
    modules = _PROJECTIONS | ({"inner_attn_ln": "sub_norm"} if sub_norm else {})
    entries: list[AnyEntry] = [
        Entry(f"{published}.{kind}", f"{ours}.{kind}")
        for published, ours in modules.items()
        for kind in ("weight", "bias")
    ]
    if xpos:
        entries.append(Constant("xpos.scale", xpos_scales(head_dim).float()))
    return entries


def relative_bias_entries() -> list[AnyEntry]:
    """The table of relative biases (`RelativePositionBias`, published beside the layers): published name → ours."""
    return [Entry("relative_attention_bias.weight", "relative_bias")]


FAMILIES: tuple[Family, ...] = ()
