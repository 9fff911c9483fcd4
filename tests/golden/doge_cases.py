"""Runners of Doge's language models, in the three released forms."""

import functools

import torch
from torch import Tensor

from farspan.mixers import SequenceLayout
from farspan.mixers.dynamic_mask import DynamicMaskMixer
from farspan.models.convert.names import AnyEntry
from farspan.models.modeling import FarspanPreTrainedModel
from farspan.ops.softmax.reference import visible
from tests.golden.case import Case
from tests.golden.model_cases import gradients, published_model
from tests.golden.padded import check_padded_loss


def seed_lm(case: Case) -> None:
    _language_model(case, "doge-seed")


def small_lm(case: Case) -> None:
    _language_model(case, "doge-small")


def current_lm(case: Case) -> None:
    """The router's losses are an argument of the published call; which split of its scores is used, of its code."""
    routed = case.config.get("is_moe", False)
    if routed:
        case.config["output_router_logits"] = "aux_loss" in case.outputs
        case.config["token_mixing"] = "flash-sparse-attention" not in case.config.get("source", "")
    _language_model(case, "doge-moe" if routed else "doge")


def _language_model(case: Case, family: str) -> None:
    """Positions count padding; a decoded text goes on where the prompt ended, one token at a time."""
    model, entries = published_model(case, family)
    # The published embedding never trains its padding row; ours does.
    model.get_input_embeddings().padding_idx = model.config.pad_token_id
    mask = case.inputs.get("attention_mask")
    inputs = {name: case.inputs[name] for name in ("input_ids", "labels", "attention_mask") if name in case.inputs}
    inputs["position_ids"] = _places(case.inputs["input_ids"])
    mixes = any(options.get("token_mixing") for options in model.config.feed_forward_options.values())
    published = functools.partial(_with_published_rows, mask=mask)
    balanced = "aux_loss" in case.outputs  # which our models form in training alone
    scores = _router_scores(model)
    out = model.train(balanced)(**inputs, output_hidden_states=True)
    _compare_outputs(case, out, scores, mask)
    if "decode_input_ids" in case.inputs:
        _decode(case, model.eval())
    if mask is None:
        _loss_and_gradients(case, model, entries, out.loss)
    elif mixes:
        case.close("loss", out.loss, case.outputs["loss"])
        # Rows without keys have the published numbers; the gradients of their scores are only in the published way.
        for block in model.base_model.blocks:
            block.mixer.forward = published(block.mixer)
        _loss_and_gradients(case, model, entries, model.train(balanced)(**inputs).loss)
    else:
        check_padded_loss(case, model, entries, inputs, published)


def _compare_outputs(case: Case, out: object, scores: list[Tensor], mask: Tensor | None) -> None:
    case.close("logits", out.logits, case.outputs["logits"], mask)
    hidden = [name for name in case.outputs if name.startswith("hidden_states.")]
    assert len(hidden) in (0, len(out.hidden_states))
    for name in hidden:
        case.close(name, out.hidden_states[int(name.rpartition(".")[2])], case.outputs[name], mask)
    for name in (name for name in case.outputs if name.startswith("router_logits.")):
        case.close(name, scores[int(name.rpartition(".")[2])], case.outputs[name])
    if "aux_loss" in case.outputs:
        case.close("aux_loss", out.aux_loss / case.config.get("router_aux_loss_coef", 0.001), case.outputs["aux_loss"])


def _loss_and_gradients(case: Case, model: FarspanPreTrainedModel, entries: list[AnyEntry], loss: Tensor) -> None:
    case.close("loss", loss, case.outputs["loss"])
    loss.backward()
    case.close_gradients(gradients(model, entries), case.grads)


def _decode(case: Case, model: FarspanPreTrainedModel) -> None:
    ids, tokens, mask = case.inputs["input_ids"], case.inputs["decode_input_ids"], case.inputs.get("attention_mask")
    prompt, every = ids.shape[1], torch.cat([ids, case.inputs["decode_input_ids"]], dim=1)
    places = _places(every)
    full = None if mask is None else torch.nn.functional.pad(mask, (0, tokens.shape[1]), value=1)

    def run(start: int, end: int, cache: object = None) -> Tensor:
        seen = None if full is None else full[:, :end]
        ours = model(
            every[:, start:end],
            attention_mask=seen,
            position_ids=places[:, start:end],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return ours.logits

    with torch.no_grad():
        case.close("full", run(0, every.shape[1]), case.outputs["full_logits"], full)
        cache = model.new_cache()
        case.close("prefill", run(0, prompt, cache), case.outputs["prefill_logits"], mask)
        steps = [run(t, t + 1, cache) for t in range(prompt, every.shape[1])]
    case.close("steps", torch.cat(steps, dim=1), case.outputs["decode_logits"])


def _places(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def _router_scores(model: FarspanPreTrainedModel) -> list[Tensor]:
    """A list that a forward pass fills with the scores of each layer's router, both axes as published."""
    found: list[Tensor] = []
    for block in model.base_model.blocks:
        experts = getattr(block.feed_forward, "experts", None)
        if experts is not None:
            experts.router.register_forward_hook(lambda _, __, out: found.append(torch.stack(out).squeeze(2).detach()))
    return found


def _with_published_rows(mixer: DynamicMaskMixer, mask: Tensor) -> functools.partial[Tensor]:
    """The mixer's forward with what the published code has at padding."""
    return functools.partial(_published_forward, mixer, mask.bool())


def _published_forward(
    mixer: DynamicMaskMixer, mask: Tensor, x: Tensor, *, layout: SequenceLayout, cache: object
) -> Tensor:
    """A padded row sees the real keys before it. Without any, all its scores are the lowest number, and so are alike.

    The seed adds that number to a bias, the others put it in its place: gradients of rows without keys differ.
    """
    options, lowest = mixer.options, torch.finfo(x.dtype).min
    q, k, v = mixer.project(x, SequenceLayout(layout.positions))
    bias = mixer.key_bias(v).transpose(1, 2).unsqueeze(2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    k, v = (part.repeat_interleave(mixer.heads // mixer.key_heads, dim=1) for part in (k, v))
    length = x.shape[1]
    seen = visible(
        length,
        length,
        causal=True,
        window=options.sliding_window,
        key_mask=mask,
        cu_seqlens=None,
        device=x.device,
    ).unsqueeze(1)
    added = bias + (~seen) * lowest if options.select == "none" else bias.masked_fill(~seen, lowest)
    if options.select != "none" and length > options.keep_window_size:
        chosen = added.topk(options.keep_window_size, dim=-1).indices
        added = added.masked_fill(torch.ones_like(added, dtype=torch.bool).scatter(-1, chosen, False), lowest)
    added = added.repeat_interleave(mixer.heads // added.shape[1], dim=1)
    weights = torch.softmax(q @ k.mT * mixer.head_dim**-0.5 + added, dim=-1)
    return mixer.o_proj((weights @ v).transpose(1, 2).flatten(2))
