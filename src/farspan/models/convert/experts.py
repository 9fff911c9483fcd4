"""Published names of the feed-forwards of Wonderful Matrices: plain and gated MLP, CDMoE, PEER, SEIMoE.

Source: LoserCheems/WonderfulMatrices: modules/, models/modeling_doge.py; transformers: models/doge.
"""

import math
from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.convert.families import Published
from farspan.models.convert.names import Entry


def mlp_entries(bias: bool, gated: bool = False) -> list[Entry]:
    """`MLP` and `GatedMLP`: published name → ours.

    Args:
        bias: whether the projections have biases.
        gated: whether there is a gate.
    """
    projections = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
    names = [f"{name}.{kind}" for name in projections for kind in ("weight", "bias")[: 1 + bias]]
    return [Entry(name, name) for name in names]


def cdmoe_entries(router: str, bias: bool = False) -> list[Entry]:
    """`CDMoE`, `DogeCDMoE`, `CheemsCDMoE`: published name → ours.

    Args:
        router: `query_key` for the seed repository, `gate` for transformers and small-doge.
        bias: whether the projections of the gated MLP have biases.
    """
    routers = {
        "query_key": [Entry("queries.weight", "queries.weight"), Entry("keys", "keys")],
        "gate": [Entry("router_gate.weight", "gate.weight")],
    }
    return [
        *(entry.under("", "shared.") for entry in mlp_entries(bias, gated=True)),
        *(entry.under("", "experts.router.") for entry in routers[router]),
        Entry("down_embed.weight", "experts.down"),
        Entry("up_embed.weight", "experts.up"),
    ]


def seed_feed_forwards(published: Published, prefix: str, bias: bool) -> dict[str, Any]:
    """The feed-forward fields of the seed repository's models, Doge and Cheems.

    Args:
        published: the checkpoint.
        prefix: of the names of one layer's feed-forward, the dot included.
        bias: whether the projections of the gated MLP have biases.
    """
    config, shapes = published.config, published.shapes
    if f"{prefix}down_embed.weight" not in shapes:
        return {"feed_forwards": ["gated_mlp"], "feed_forward_options": {"gated_mlp": {"bias": True}} if bias else {}}
    experts, heads = shapes[f"{prefix}down_embed.weight"][0], shapes[f"{prefix}keys"][0]
    reachable = math.isqrt(experts) ** 2
    options = {
        "num_experts": reachable,
        "unreachable_experts": experts - reachable,
        "num_experts_per_tok": config.get("num_cdmoe_experts_per_head", 8),
        "num_expert_heads": heads,
        "router": "query_key",
        "retrieval_size": config.get("expert_retrieval_size", 2 * shapes[f"{prefix}keys"][-1]),
        "router_aux_loss_coef": 0.0,  # the seed repository balances nothing
        "bias": bias,
    }
    return {"feed_forwards": ["cdmoe"], "feed_forward_options": {"cdmoe": options}}


def seed_expert_settings(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `seed_feed_forwards`, as fields of the published configuration."""
    if "cdmoe" not in config.feed_forwards:
        return {"is_moe": False}
    options = config.feed_forward_options["cdmoe"]
    return {
        "is_moe": True,
        "num_cdmoe_experts": options["num_experts"] + options.get("unreachable_experts", 0),
        "num_cdmoe_heads": options["num_expert_heads"],
        "num_cdmoe_experts_per_head": options["num_experts_per_tok"],
        "expert_retrieval_size": options["retrieval_size"],
    }


def peer_entries(pre_norm: bool = False) -> list[Entry]:
    """`PEER`: published name → ours.

    Args:
        pre_norm: whether it normalises its input.
    """
    return [
        *([Entry("norm.gamma", "norm.weight")] if pre_norm else []),
        Entry("to_queries.0.weight", "experts.router.queries.weight"),
        Entry("keys", "experts.router.keys"),
        Entry("weight_down_embed.weight", "experts.down"),
        Entry("weight_up_embed.weight", "experts.up"),
    ]


def seimoe_entries(experts: int, bias: bool = True) -> list[Entry]:
    """`SEIMoE`: published name → ours.

    Args:
        experts: number of routed experts.
        bias: whether the projections have biases.
    """
    places = [*(f"experts.{i}." for i in range(experts)), "shared_expert."]
    return [
        Entry("router.weight", "router.weight"),
        Entry("shared_expert_gate.weight", "shared_expert_gate.weight"),
        *(entry.under(place, place) for place in places for entry in mlp_entries(bias)),
    ]
