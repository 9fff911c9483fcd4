"""Runners of the MetaLA kinds and of the gated linear operator."""

import torch
from torch import Tensor

from farspan.mixers import SequenceLayout
from farspan.mixers.metala import MetaLAMixer, MetaLAOptions
from farspan.models.blocks import FarspanBlock
from farspan.models.cache import positions_of
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.metala import mixer_entries, neox_layer_entries
from farspan.models.convert.names import to_ours
from farspan.ops import gated_linear_attention
from tests.golden.case import Case
from tests.golden.model_cases import gradients, published_model


def gated_linear_attention_op(case: Case) -> None:
    """Operator tensors are head-first, `[B, H, T, K]`; the loss weighs outputs and final state."""
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in ("q", "k", "v", "log_decay")}
    initial = case.inputs["initial_state"].clone().requires_grad_()
    out, state = gated_linear_attention(
        *(leaves[name].transpose(1, 2) for name in ("q", "k", "v", "log_decay")),
        scale=case.config["scale"],
        initial_state=initial,
        output_final_state=True,
    )
    out = out.transpose(1, 2)
    assert state is not None
    case.close("o", out, case.outputs["o"])
    case.close("final state", state, case.outputs["final_state"])
    loss = (out * case.inputs["loss_weight_o"]).sum() + (state * case.inputs["loss_weight_state"]).sum()
    case.close("loss", loss.reshape(1), case.outputs["loss"])
    loss.backward()
    ours = {name: leaf.grad for name, leaf in leaves.items()} | {"initial_state": initial.grad}
    case.close_gradients({name: grad for name, grad in ours.items() if grad is not None}, case.grads)


def hf_mixer(case: Case) -> None:
    mixer, entries = _mixer(case, case.config["embed_dim"], case.config["num_heads"])
    x = case.inputs["x"].clone().requires_grad_()
    mask = _mask(case)
    cache = mixer.new_cache()
    out = mixer(x, layout=_layout(x, mask), cache=None)
    mixer(x, layout=_layout(x, mask), cache=cache)
    case.close("o", out, case.outputs["o"], mask)
    case.close("state", cache.get("recurrent"), case.outputs["state"])
    case.close("conv_state", cache.get("convolution"), case.outputs["conv_state"])
    loss = (out * case.inputs["loss_weight"]).sum()
    case.close("loss", loss.reshape(1), case.outputs["loss"])
    loss.backward()
    ours = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None} | {"input.x": x.grad}
    theirs = dict(case.grads)
    input_gradient = {"input.x": theirs.pop("input.x")}
    case.close_gradients(ours, to_ours(theirs, entries, partial=True) | input_gradient)


def hf_decode(case: Case) -> None:
    mixer, _ = _mixer(case, case.config["embed_dim"], case.config["num_heads"])
    prefill, steps = case.config["prefill"], case.config["steps"]
    x, mask = case.inputs["x"], _mask(case)
    full_mask = None if mask is None else torch.cat((mask, torch.ones(len(x), steps)), dim=1)
    with torch.no_grad():
        case.close("full", mixer(x, layout=_layout(x, full_mask)), case.outputs["full"], full_mask)
        cache = mixer.new_cache()
        head = x[:, :prefill]
        case.close("prefill", mixer(head, layout=_layout(head, mask), cache=cache), case.outputs["prefill"], mask)
        case.close("prefill state", cache.get("recurrent"), case.outputs["prefill_state"])
        case.close("prefill conv_state", cache.get("convolution"), case.outputs["prefill_conv_state"])
        for i in range(steps):
            token = x[:, prefill + i : prefill + i + 1]
            case.close(f"step {i}", mixer(token, layout=_layout(token, None), cache=cache), case.outputs[f"step{i}"])
            case.close(f"state {i}", cache.get("recurrent"), case.outputs[f"step{i}_state"])
            case.close(f"conv_state {i}", cache.get("convolution"), case.outputs[f"step{i}_conv_state"])


def neox_layer(case: Case) -> None:
    """The published layer is `[L, B, D]`; the attention output is of the raw input, without the norm."""
    width, heads = case.config["hidden_size"], case.config["num_attention_heads"]
    norm_type = "layer_norm" if case.config["norm"] == "layernorm" else "neox_rms_norm"
    config = FarspanConfig(
        vocab_size=1,
        hidden_size=width,
        intermediate_size=case.config["intermediate_size"],
        num_attention_heads=heads,
        mixers=["metala"],
        norm_type=norm_type,
        norm_eps=case.config["norm_eps"],
        hidden_act=case.config["activation"],
    )
    block = FarspanBlock(config, 0)
    entries = neox_layer_entries(width, heads, width // 2, norm_type)
    block.load_state_dict(to_ours(case.params, entries))
    x = case.inputs["x"].clone().requires_grad_()
    batch_first = x.transpose(0, 1)
    layout = _layout(batch_first, None)
    cache = block.mixer.new_cache()
    with torch.no_grad():
        attention = block.mixer(batch_first, layout=layout, cache=cache)
    case.close("attention", attention.transpose(0, 1), case.outputs["attention"])
    case.close("attention state", cache.get("recurrent"), case.outputs["attention_state"])
    out = block(batch_first, layout=layout)[0].transpose(0, 1)
    case.close("layer", out, case.outputs["layer"])
    loss = (out * case.inputs["loss_weight"]).sum()
    case.close("loss", loss.reshape(1), case.outputs["loss"])
    loss.backward()
    theirs = dict(case.grads)
    input_gradient = {"input.x": theirs.pop("input.x")}
    ours = {name: p.grad for name, p in block.named_parameters() if p.grad is not None} | {"input.x": x.grad}
    case.close_gradients(ours, to_ours(theirs, entries, partial=True) | input_gradient)


def hf_lm(case: Case) -> None:
    """Losses and gradients; then the prompt at once and, greedily, what follows, with the memory.

    The published code updates the inputs of the convolution in place: those that it recorded for the prompt are the
    ones after the last step.
    """
    model, entries = published_model(case, "metala")
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    out = model(**case.inputs)
    case.close("logits", out.logits, case.outputs["logits_train"], mask)
    case.close("loss", out.loss.reshape(1), case.outputs["loss"])
    out.loss.backward()
    ours = gradients(model, entries)
    # The published embedding never learns its padding row; ours does where the state of a pad predicts a token.
    ours["model.embed_tokens.weight"][model.config.pad_token_id] = 0
    case.close_gradients(ours, case.grads)
    with torch.no_grad():
        cache = model.new_cache()
        out = model(ids, attention_mask=mask, past_key_values=cache)
        case.close("prompt", out.logits, case.outputs["prefill_logits"], mask)
        for i, memory in enumerate(cache.layers):
            case.close(f"state {i}", memory.get("recurrent"), case.outputs[f"prefill_state.{i}"])
        step, last = 0, out.logits[:, -1:]
        while f"decode_logits.{step}" in case.outputs:
            token = last.argmax(-1)
            assert token.flatten().equal(case.outputs["generated_ids"][:, ids.shape[1] + step]), f"token {step}"
            last = model(token, past_key_values=cache).logits
            case.close(f"step {step}", last, case.outputs[f"decode_logits.{step}"])
            step += 1
        for i, memory in enumerate(cache.layers):
            case.close(f"inputs {i}", memory.get("convolution"), case.outputs[f"prefill_conv_state.{i}"])
        written = case.outputs["generated_ids"].shape[1] - ids.shape[1]
        assert written - 1 <= step <= written
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=written, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert generated.equal(case.outputs["generated_ids"])


def _mixer(case: Case, width: int, heads: int) -> tuple[MetaLAMixer, list]:
    config = FarspanConfig(vocab_size=1, hidden_size=width, num_attention_heads=heads, mixers=["metala"])
    key_dim, conv_size = len(case.params["aug_balance"]), case.params["conv1d.weight"].shape[-1]
    mixer = MetaLAMixer(
        config,
        MetaLAOptions(
            key_dim=key_dim,
            value_dim=len(case.params["v_proj.weight"]),
            conv_size=conv_size,
            decay_normalizer=float(case.config.get("normalizer", 16)),
        ),
        layer_idx=0,
    )
    entries = mixer_entries(width, heads, key_dim, conv_size)
    mixer.load_state_dict(to_ours(case.params, entries))
    return mixer, entries


def _mask(case: Case) -> Tensor | None:
    return case.inputs.get("attention_mask")


def _layout(x: Tensor, mask: Tensor | None) -> SequenceLayout:
    keep = None if mask is None else mask.bool()
    return SequenceLayout(positions_of(keep, (x.shape[0], x.shape[1]), None, x.device), keep)
