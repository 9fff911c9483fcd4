"""Published names and settings of Wonderful Matrices' state space duality: the module and Cheems' layer.

Source: LoserCheems/WonderfulMatrices: modules/ssd.py, models/modeling_cheems.py.
"""

from typing import Any

from farspan.models.convert.families import Family
from farspan.models.convert.names import Entry


def ssd_module_options(state_size: int, groups: int) -> dict[str, Any]:
    """Options of the `ssd` mixer under which it is the module `SSD(d_model, n_heads, d_state, n_groups, chunk_len)`."""
    return {"state_size": state_size, "groups": groups, "tiled_groups": True, "rope": False, "bias": True}


def ssd_module_entries() -> list[Entry]:
    """The module `SSD`: published name → ours."""
    projections = {"x_proj": "x_proj", "B_proj": "b_proj", "C_proj": "c_proj", "out_proj": "o_proj"}
    return [Entry("A_log", "decay"), Entry("D", "skip"), *_linear_entries(projections, bias=True)]


def ssd_layer_options(bias: bool = False) -> dict[str, Any]:
    """Options of the `ssd` mixer under which it is `CheemsStateSpaceDuality` with `hidden_bias=bias`."""
    return {"log_decay": False, "skip": False, "bias": bias, "dt_bias": bias, "padding_writes": True}


def ssd_layer_entries(bias: bool = False) -> list[Entry]:
    """The layer `CheemsStateSpaceDuality`: published name → ours."""
    projections = {"x_proj": "x_proj", "b_proj": "b_proj", "c_proj": "c_proj", "out_proj": "o_proj"}
    return [Entry("A", "decay"), *_linear_entries(projections, bias)]


def _linear_entries(projections: dict[str, str], bias: bool) -> list[Entry]:
    """The projections; the bias of the step size is a parameter of our mixer itself."""
    kinds = ("weight", "bias") if bias else ("weight",)
    linear = [
        Entry(f"{published}.{kind}", f"{ours}.{kind}") for published, ours in projections.items() for kind in kinds
    ]
    step = [Entry("dt_proj.weight", "dt_proj.weight"), *([Entry("dt_proj.bias", "dt_bias")] if bias else [])]
    return linear + step


FAMILIES: tuple[Family, ...] = ()
