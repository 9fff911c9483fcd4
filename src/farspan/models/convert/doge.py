"""Published names of Doge: its dynamic-mask attention in all released families.

Source: LoserCheems/WonderfulMatrices: modules/dmattn.py, models/modeling_doge.py; SmallDoges/small-doge: models/doge;
transformers: models/doge; flash-algo/flash-sparse-attention: examples/modeling/modeling_doge.py.
"""

from collections.abc import Mapping

from torch import Tensor

from farspan.models.convert.families import Family
from farspan.models.convert.names import Entry

_LINEARS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "o_proj"}


def attention_entries(*, bias: bool = False, qk_norm: bool = True, biased: bool = True) -> list[Entry]:
    """The attention of every family: published name → `DynamicMaskMixer`'s.

    Args:
        bias: whether the linear layers have biases (the seed's module; `hidden_bias`, `attention_bias` elsewhere).
        qk_norm: whether there are norms of queries and keys (transformers and the newest form).
        biased: whether the dynamic bias is used; the seed's `is_causal` leaves its parameters unused.
    """
    linears = {**_LINEARS, "dt_proj": "bias_proj"} if biased else _LINEARS
    kinds = ("weight", "bias") if bias else ("weight",)
    entries = [Entry(f"{name}.{kind}", f"{ours}.{kind}") for name, ours in linears.items() for kind in kinds]
    if biased:
        entries.append(Entry("A", "bias_scale"))
    if qk_norm:
        entries += [Entry(f"{name}.weight", f"{name}.weight") for name in ("q_norm", "k_norm")]
    return entries


def attention_options(state: Mapping[str, Tensor], key_width: int) -> dict[str, object]:
    """Options of the mixer that a published attention's parameters tell: biases, norms, and heads of the bias.

    Args:
        state: published name → tensor of one attention.
        key_width: channels per head.

    Returns:
        Fields of `DynamicMaskOptions`.
    """
    key_heads = state["k_proj.weight"].shape[0] // key_width
    return {
        "attention_bias": "q_proj.bias" in state,
        "qk_norm": "q_norm.weight" in state,
        "bias_heads": "kv" if len(state["A"]) == key_heads else "query",
    }


FAMILIES: tuple[Family, ...] = ()
