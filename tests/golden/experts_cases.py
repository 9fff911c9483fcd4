"""Runners of the feed-forward kinds: CDMoE with both routers, PEER, SEIMoE, plain and gated MLP."""

import math
from types import SimpleNamespace
from typing import Any

import torch

from farspan.models.convert.experts import cdmoe_entries, mlp_entries, peer_entries, seimoe_entries
from farspan.models.convert.names import Entry, to_ours
from farspan.nn.experts.cdmoe import CDMoE, CDMoEOptions
from farspan.nn.experts.peer import PEER, PEEROptions
from farspan.nn.experts.seimoe import SEIMoE, SEIMoEOptions
from farspan.nn.feed_forward import MLP, FeedForward, GatedMLP, MLPOptions
from tests.golden.case import Case


def mlp(case: Case) -> None:
    _run(case, MLP(*_mlp(case)), mlp_entries(_has_bias(case)))


def gated_mlp(case: Case) -> None:
    _run(case, GatedMLP(*_mlp(case)), mlp_entries(_has_bias(case), gated=True))


def cdmoe_gate(case: Case, token_mixing: bool = False) -> None:
    config = case.config
    options = CDMoEOptions(
        **_tables(config["num_experts"]),
        num_experts_per_tok=config["num_experts_per_tok"],
        token_mixing=token_mixing,
        intermediate_size=config["intermediate_size"],
        bias=_has_bias(case),
    )
    module = CDMoE(_shape(config["hidden_size"], config.get("hidden_act", "silu")), options)
    _run(case, module, cdmoe_entries("gate", options.bias))
    if "router_logits" in case.outputs:
        routing = module.experts.route(case.inputs["hidden_states"].flatten(0, 1))
        logits = torch.cat((routing.scores_x, routing.scores_y), dim=1).transpose(0, 1)
        case.close("router logits", logits, case.outputs["router_logits"])


def cdmoe_gate_token_mixing(case: Case) -> None:
    cdmoe_gate(case, token_mixing=True)


def cdmoe_query_key(case: Case) -> None:
    """The module and the layer of the model name their settings differently."""
    found = case.config

    def setting(*names: str, default: Any = None) -> Any:
        return next((found[name] for name in names if name in found), default)

    options = CDMoEOptions(
        **_tables(setting("n_experts", "num_cdmoe_experts")),
        num_experts_per_tok=setting("n_experts_per_head", "num_cdmoe_experts_per_head"),
        router="query_key",
        num_expert_heads=setting("n_experts_heads", "num_cdmoe_heads"),
        retrieval_size=setting("d_expert_retrieval", "expert_retrieval_size"),
        intermediate_size=setting("d_cd", "intermediate_size"),
        bias=_has_bias(case),
    )
    shape = _shape(setting("d_model", "hidden_size"), setting("act_fn", "hidden_act", default="silu"))
    _run(case, CDMoE(shape, options), cdmoe_entries("query_key", options.bias))


def peer(case: Case) -> None:
    config = case.config
    width = config["dim"]
    options = PEEROptions(
        num_experts=config["num_experts"],
        num_experts_per_tok=config.get("num_experts_per_head", 16),
        num_expert_heads=config.get("heads", 8),
        retrieval_size=2 * (config.get("dim_key") or width // 2),
        pre_norm="norm.gamma" in case.params,
        separate_experts=config.get("separate_embed_per_head", False),
    )
    _run(case, PEER(_shape(width), options), peer_entries(options.pre_norm))


def seimoe(case: Case) -> None:
    config = case.config
    options = SEIMoEOptions(
        intermediate_size=config["d_ff"],
        bias=_has_bias(case),
        num_experts=config["n_experts"],
        num_experts_per_tok=config["n_experts_per_topk"],
    )
    module = SEIMoE(_shape(config["d_model"], config["act_fn"]), options)
    _run(case, module, seimoe_entries(options.num_experts, options.bias))


def _run(case: Case, module: FeedForward, entries: list[Entry]) -> None:
    module.load_state_dict(to_ours(case.params, entries))
    x = case.inputs["hidden_states"].clone().requires_grad_()
    y, _ = module(x)
    case.close("hidden_states", y, case.outputs["hidden_states"])
    loss = (y * case.inputs["loss_weight"]).sum()
    case.close("loss", loss, case.outputs["loss"])
    loss.backward()
    theirs = dict(case.grads)
    of_inputs = {name: theirs.pop(name) for name in list(theirs) if name.startswith("input.")}
    ours = {name: p.grad for name, p in module.named_parameters() if p.grad is not None} | {
        "input.hidden_states": x.grad
    }
    case.close_gradients(ours, to_ours(theirs, entries, partial=True) | of_inputs)


def _mlp(case: Case) -> tuple[SimpleNamespace, MLPOptions]:
    return _shape(case.config["d_model"], case.config["act_fn"]), MLPOptions(case.config["d_ff"], bias=_has_bias(case))


def _tables(experts: int) -> dict[str, int]:
    """Sizes of the tables; the published code takes ⌊√E⌋ keys per axis of any E."""
    reachable = math.isqrt(experts) ** 2
    return {"num_experts": reachable, "unreachable_experts": experts - reachable}


def _has_bias(case: Case) -> bool:
    return any(name.endswith("up_proj.bias") for name in case.params)


def _shape(width: int, hidden_act: str = "silu") -> SimpleNamespace:
    return SimpleNamespace(
        hidden_size=width, intermediate_size=width, hidden_act=hidden_act, initializer_range=0.02, norm_eps=1e-6
    )
