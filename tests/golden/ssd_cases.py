"""Runners of state space duality: the module of Wonderful Matrices and Cheems' layer."""

import torch
from torch import Tensor

from farspan.mixers import SequenceLayout, StateCache
from farspan.mixers.ssd import SSDMixer, SSDOptions
from farspan.models.cache import positions_of
from farspan.models.configuration import FarspanConfig
from farspan.models.convert import cheems
from farspan.models.convert.names import Entry, to_ours
from tests.golden.case import Case


def seed_module(case: Case) -> None:
    settings = case.config
    options = cheems.ssd_module_options(settings["d_state"], settings["n_groups"])
    config = FarspanConfig(vocab_size=1, hidden_size=settings["d_model"], num_attention_heads=settings["n_heads"])
    mixer, entries = _load(case, config, options, cheems.ssd_module_entries())
    _whole(case, mixer, entries, case.outputs.get("final_state"))


def cheems_layer(case: Case) -> None:
    """Positions count padding. After the prompt come the decoded tokens, one at a time."""
    settings = case.config
    config = FarspanConfig(
        vocab_size=1,
        hidden_size=settings["hidden_size"],
        num_attention_heads=settings["num_attention_heads"],
        rope_parameters={"rope_theta": settings["rope_theta"]},
    )
    bias = settings["hidden_bias"]
    mixer, entries = _load(case, config, cheems.ssd_layer_options(bias), cheems.ssd_layer_entries(bias))
    cache = _whole(case, mixer, entries, case.outputs.get("prefill_state"))
    tokens = case.inputs.get("decode_hidden_states")
    if tokens is None:
        return
    seen, steps = case.inputs["hidden_states"].shape[1], []
    with torch.no_grad():
        for t, token in enumerate(tokens.split(1, dim=1)):
            steps.append(mixer(token, layout=_layout(token, None, seen + t), cache=cache))
    case.close("decoded", torch.cat(steps, dim=1), case.outputs["decode_hidden_states"])
    case.close("final state", cache.get("recurrent").mT, case.outputs["final_state"])


def _load(case: Case, config: FarspanConfig, options: dict, entries: list[Entry]) -> tuple[SSDMixer, list[Entry]]:
    mixer = SSDMixer(config, SSDOptions(**options), layer_idx=0)
    mixer.load_state_dict(to_ours(case.params, entries))
    return mixer, entries


def _whole(case: Case, mixer: SSDMixer, entries: list[Entry], state: Tensor | None) -> StateCache:
    """The sequence at once: output, loss, gradients and the state, which is published as `[B, H, V, K]`."""
    x, mask = case.inputs["hidden_states"].clone().requires_grad_(), case.inputs.get("attention_mask")
    layout = _layout(x, mask)
    out = mixer(x, layout=layout)
    case.close("output", out, case.outputs["hidden_states"], mask)
    loss = (out * case.inputs["loss_weight"]).sum()
    case.close("loss", loss, case.outputs["loss"])
    loss.backward()
    theirs = dict(case.grads)
    of_input = {name: theirs.pop(name) for name in list(theirs) if name.startswith("input.")}
    ours = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None} | {
        "input.hidden_states": x.grad
    }
    case.close_gradients(ours, to_ours(theirs, entries, partial=True) | of_input)
    cache = mixer.new_cache()
    with torch.no_grad():
        mixer(x, layout=layout, cache=cache)
    if state is not None:
        case.close("state", cache.get("recurrent").mT, state)
    return cache


def _layout(x: Tensor, mask: Tensor | None, start: int = 0) -> SequenceLayout:
    positions = positions_of(None, (x.shape[0], x.shape[1]), None, x.device) + start
    return SequenceLayout(positions, None if mask is None else mask.bool())
