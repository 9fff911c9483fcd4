"""Runners of the Cottention kinds."""

import torch
from torch import Tensor, nn

from farspan.mixers import SequenceLayout
from farspan.mixers.cosine import CosineMixer, CosineOptions
from farspan.models.cache import positions_of
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.cottention import bert_self_attention_entries, gpt_attention_entries
from farspan.models.convert.names import Entry, to_ours
from farspan.ops import cosine_attention, gated_linear_attention
from tests.golden.case import Case


def causal_op(case: Case) -> None:
    """The bare recurrence on unit vectors, head-first; then cosine attention, whose gradient stays on the sphere."""
    leaves = {name: case.inputs[name].transpose(1, 2).clone().requires_grad_() for name in ("q", "k", "v")}
    for attend in (_plain, _cosine):
        for leaf in leaves.values():
            leaf.grad = None
        out, state = attend(**leaves)
        out = out.transpose(1, 2)
        case.close("out", out, case.outputs["out"])
        case.close("final state", state.mT, case.outputs["final_state"])
        loss = (out * case.inputs["grad_out"]).sum()
        if "loss" in case.outputs:
            case.close("loss", loss, case.outputs["loss"])
        loss.backward()
        theirs = dict(case.grads)
        if attend is _cosine:
            theirs |= {name: _tangent(theirs[name], case.inputs[name]) for name in ("q", "k") if name in theirs}
        ours = {name: leaf.grad.transpose(1, 2) for name, leaf in leaves.items() if leaf.grad is not None}
        case.close_gradients(ours, theirs)


def bert_attention(case: Case) -> None:
    """The module ends before the output projection."""
    heads = case.config["num_attention_heads"]
    mixer = _mixer(case, heads, CosineOptions(attention_bias=True, rope=False), causal=False)
    mixer.o_proj = nn.Identity()
    _run(case, mixer, bert_self_attention_entries(heads), "context")


def gpt_attention(case: Case) -> None:
    heads, head_dim = case.config["n_head"], case.config["n_embd"] // case.config["n_head"]
    rotary = case.config["rotary_dim"] or head_dim
    options = CosineOptions(partial_rotary_factor=rotary / head_dim, rope_interleaved=True)
    _run(case, _mixer(case, heads, options, causal=True), gpt_attention_entries(heads), "attn_output")


def _run(case: Case, mixer: CosineMixer, entries: list[Entry], output: str) -> None:
    mixer.load_state_dict(to_ours(case.params, entries))
    x = case.inputs["hidden_states"].clone().requires_grad_()
    mask = case.inputs["attention_mask"].bool() if "attention_mask" in case.inputs else None
    positions = case.inputs.get("position_ids", positions_of(mask, (x.shape[0], x.shape[1]), None, x.device))
    out = mixer(x, layout=SequenceLayout(positions, mask))
    case.close(output, out, case.outputs[output], mask)
    loss = (out * case.inputs["loss_weight"]).sum()
    case.close("loss", loss, case.outputs["loss"])
    loss.backward()
    theirs = dict(case.grads)
    input_gradient = {"hidden_states": theirs.pop("hidden_states")}
    ours = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None} | {"hidden_states": x.grad}
    case.close_gradients(ours, to_ours(theirs, entries, partial=True) | input_gradient)


def _mixer(case: Case, heads: int, options: CosineOptions, *, causal: bool) -> CosineMixer:
    width = case.inputs["hidden_states"].shape[-1]
    config = FarspanConfig(vocab_size=1, hidden_size=width, num_attention_heads=heads, mixers=["cosine"], causal=causal)
    return CosineMixer(config, options, layer_idx=0)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    return gated_linear_attention(q, k, v, scale=1.0, output_final_state=True)


def _cosine(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    return cosine_attention(q, k, v, output_final_state=True)


def _tangent(gradient: Tensor, unit: Tensor) -> Tensor:
    """What the normalisation leaves of a gradient at a unit vector."""
    return gradient - unit * torch.linalg.vecdot(gradient, unit).unsqueeze(-1)
