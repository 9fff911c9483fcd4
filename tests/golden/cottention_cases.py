"""Runners of the Cottention kinds."""

import torch
from torch import Tensor, nn

from farspan.mixers import SequenceLayout
from farspan.mixers.cosine import CosineMixer, CosineOptions
from farspan.models.cache import FarspanCache, positions_of
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.cottention import bert_self_attention_entries, gpt_attention_entries
from farspan.models.convert.names import Entry, to_ours
from farspan.ops import cosine_attention, gated_linear_attention
from tests.golden.case import Case
from tests.golden.model_cases import gradients, published_model


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


def bert_pretraining(case: Case) -> None:
    """Both losses; the published loss is their sum."""
    model, entries = published_model(case, _family(case, "cottention-bert", "bert"))
    out = model(**_inputs(case), output_hidden_states=True)
    for name, ours in (
        ("loss", out.loss),
        ("mlm_loss", out.mlm_loss),
        ("nsp_loss", out.nsp_loss),
        ("prediction_logits", out.logits),
        ("seq_relationship_logits", out.seq_relationship_logits),
    ):
        _compare(case, name, ours)
    _hidden_states(case, out.hidden_states)
    out.loss.backward()
    case.close_gradients(gradients(model, entries), case.grads)
    with torch.no_grad():  # the head on scored places alone
        _compare(case, "loss", model(**_inputs(case), output_logits=False).loss)


def bert_sequence_classification(case: Case) -> None:
    model, entries = published_model(case, _family(case, "cottention-bert", "bert"))
    out = model(**_inputs(case), output_hidden_states=True)
    case.close("logits", out.logits, case.outputs["logits"])
    _compare(case, "loss", out.loss)
    _hidden_states(case, out.hidden_states)
    out.loss.backward()
    case.close_gradients(gradients(model, entries), case.grads)


def gpt_lm(case: Case) -> None:
    """The labels are aligned already."""
    model, entries = published_model(case, _family(case, "cottention-gpt", "gptj"))
    inputs = _inputs(case)
    out = model(**inputs, shift_labels=inputs.pop("labels"), output_hidden_states=True)
    _compare(case, "logits", out.logits)
    _compare(case, "loss", out.loss)
    _hidden_states(case, out.hidden_states)
    out.loss.backward()
    case.close_gradients(gradients(model, entries), case.grads)


def gpt_decode(case: Case) -> None:
    """States are published as V × K in float64, and hold all that was read."""
    model, _ = published_model(case, _family(case, "cottention-gpt", "gptj"))
    ids, prefill = case.inputs["input_ids"], case.outputs["prefill_logits"].shape[1]
    assert ids.shape[1] == prefill + case.outputs["step_logits"].shape[1]
    cache = model.new_cache()
    with torch.no_grad():
        case.close("full", model(ids).logits, case.outputs["full_logits"])
        case.close("prefill", model(ids[:, :prefill], past_key_values=cache).logits, case.outputs["prefill_logits"])
        _states(case, cache, "state_after_prefill")
        steps = [model(token, past_key_values=cache).logits for token in ids[:, prefill:].split(1, dim=1)]
    case.close("steps", torch.cat(steps, dim=1), case.outputs["step_logits"])
    case.close("steps as in the whole", torch.cat(steps, dim=1), case.outputs["full_logits"][:, prefill:])
    _states(case, cache, "state_final")


def _family(case: Case, cosine: str, softmax: str) -> str:
    return cosine if case.config["attention_type"] == "cos" else softmax


def _inputs(case: Case) -> dict[str, Tensor]:
    """The published models count padding as positions unless they are told otherwise."""
    places = torch.arange(case.inputs["input_ids"].shape[1]).expand_as(case.inputs["input_ids"])
    return {"position_ids": places, **case.inputs}


def _compare(case: Case, name: str, ours: Tensor) -> None:
    rows = case.inputs.get("attention_mask") if ours.dim() == 3 else None
    case.close(name, ours, case.outputs[name], rows)


def _hidden_states(case: Case, ours: tuple[Tensor, ...]) -> None:
    published = [name for name in case.outputs if name.startswith("hidden_states.")]
    assert not published or len(published) == len(ours)
    for name in published:
        _compare(case, name, ours[int(name.rpartition(".")[2])])


def _states(case: Case, cache: FarspanCache, name: str) -> None:
    for i, memory in enumerate(cache.layers):
        case.close(f"{name} {i}", memory.get("recurrent").mT.double(), case.outputs[f"{name}.{i}"])


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
