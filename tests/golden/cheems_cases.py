"""Runner of Cheems' language models."""

import torch

from farspan.mixers.dynamic_mask import DynamicMaskMixer
from tests.golden.case import Case
from tests.golden.model_cases import gradients, published_model
from tests.golden.padded import all_alike, check_padded_loss


def language_model(case: Case) -> None:
    """Positions count padding; a decoded text goes on where the prompt ended, one token at a time."""
    model, entries = published_model(case, "cheems")
    # The published embedding never trains its padding row; ours does.
    model.get_input_embeddings().padding_idx = model.config.pad_token_id
    mask, outputs = case.inputs.get("attention_mask"), case.outputs
    ids = case.inputs["input_ids"]
    inputs = {name: x for name, x in case.inputs.items() if name in ("input_ids", "labels", "attention_mask")}
    inputs["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
    out = model(**inputs, output_hidden_states=True)
    case.close("logits", out.logits, outputs["logits"], mask)
    for name in (name for name in outputs if name.startswith("hidden_states.")):
        case.close(name, out.hidden_states[int(name.rpartition(".")[2])], outputs[name], mask)
    if mask is None:
        case.close("loss", out.loss, outputs["loss"])
        out.loss.backward()
        case.close_gradients(gradients(model, entries), case.grads)
    else:
        check_padded_loss(
            case,
            model,
            entries,
            inputs,
            lambda mixer: all_alike(mixer, mask) if isinstance(mixer, DynamicMaskMixer) else None,
        )
    if "decode_input_ids" not in case.inputs:
        return
    assert mask is None, f"{case.name}: decoding behind padding is undefined in the published code"
    tokens, cache = case.inputs["decode_input_ids"], model.new_cache()
    with torch.no_grad():
        case.close("full", model(torch.cat([ids, tokens], dim=1)).logits, outputs["full_logits"])
        case.close("prefill", model(ids, past_key_values=cache).logits, outputs["prefill_logits"])
        steps = [model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]
    case.close("steps", torch.cat(steps, dim=1), outputs["decode_logits"])
