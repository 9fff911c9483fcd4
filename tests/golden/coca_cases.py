"""Runners of the CoCA kinds."""

import functools

import torch
from torch import Tensor

from farspan.mixers import SequenceLayout
from farspan.mixers.collinear import CollinearMixer, CollinearOptions
from farspan.models.cache import FarspanCache
from farspan.models.configuration import FarspanConfig
from farspan.models.convert import families
from farspan.models.convert.coca import llama_attention_entries, neox_attention_entries
from farspan.models.convert.families import Published
from farspan.models.convert.names import AnyEntry, to_ours, to_published
from farspan.models.modeling import FarspanPreTrainedModel
from farspan.nn.positions import rope_frequencies, rotary_table
from farspan.ops import collinear_attention, collinear_coefficients
from farspan.ops.collinear.reference import collinear_key, collinear_query
from farspan.ops.softmax.reference import visible
from tests.golden.case import Case
from tests.golden.model_cases import build, gradients
from tests.golden.padded import check_padded_loss


def llama_attention(case: Case) -> None:
    _attention(case, _mixer(case, CollinearOptions()), llama_attention_entries())


def neox_attention(case: Case) -> None:
    config = case.config
    factor = config["rotary_pct"]
    options = CollinearOptions(partial_rotary_factor=factor, tie="head", attention_bias=True)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    entries = neox_attention_entries(width, heads, int(width // heads * factor), config["rotary_emb_base"])
    _attention(case, _mixer(case, options), entries)


def llama_lm(case: Case) -> None:
    _language_model(case, "coca-llama")


def neox_lm(case: Case) -> None:
    _language_model(case, "coca-neox")


def llama_decode(case: Case) -> None:
    _decode(case, "coca-llama")


def neox_decode(case: Case) -> None:
    _decode(case, "coca-neox")


def scores(case: Case) -> None:
    """Tensors are head-first, `[B, H, L, d]`; the strict form is Eq. 9 of the paper, evaluated by brute force."""
    q, raw, v = (case.inputs[name].transpose(1, 2) for name in ("q", "t_raw", "v"))
    frequencies, _ = rope_frequencies(q.shape[-1], {"rope_theta": case.config["rope_base"]}, 1, 1)
    cos, sin = rotary_table(case.inputs["position_ids"], frequencies)
    t = collinear_coefficients(raw)
    case.close("t_half", t.transpose(1, 2), case.outputs["t_half"])
    for form in ("slack", "strict"):
        query = collinear_query(q, cos, sin, form=form, scale=1.0)
        key = collinear_key(t, cos, sin, form=form, tie="rotary")
        unscaled = torch.einsum("bthk,bshk->bhts", query, key)
        case.close(f"scores {form}", unscaled, case.outputs[f"scores_{form}_unscaled"])
        for backend in ("reference", "torch"):
            out = collinear_attention(q, t, v, cos, sin, form=form, causal=case.config["causal"], backend=backend)
            case.close(f"attention {form}", out.transpose(1, 2), case.outputs[f"attn_{form}"])


def _model(case: Case, family: str) -> tuple[FarspanPreTrainedModel, list[AnyEntry]]:
    """GPT-NeoX's names are the stock model's, so the family has to be among those that are possible."""
    published = Published(case.config, {name: tuple(x.shape) for name, x in case.params.items()})
    found = families.get(family)
    assert found.matches(published)
    if family == "coca-llama":
        assert families.detect(published).name == family
    return build(case, found, published)


def _language_model(case: Case, family: str) -> None:
    """Scaled positions are a pure function of the length: a long text leaves nothing behind, unlike the reference."""
    model, entries = _model(case, family)
    mask, outputs = case.inputs.get("attention_mask"), case.outputs
    out = model(**case.inputs, output_hidden_states=True, output_attentions=True, use_cache=True)
    case.close("logits", out.logits, outputs["logits"], mask)
    for name in (name for name in outputs if name.startswith("hidden_states.")):
        case.close(name, out.hidden_states[int(name.rpartition(".")[2])], outputs[name], mask)
    for name in (name for name in outputs if name.startswith("attn_weights.")):
        weights = out.attentions[int(name.rpartition(".")[2])]
        case.close(name, weights.transpose(1, 2), outputs[name].transpose(1, 2), mask)
    if mask is None:
        case.close("loss", out.loss, outputs["loss"])
        out.loss.backward()
        case.close_gradients(gradients(model, entries), case.grads)
    else:
        published = functools.partial(functools.partial, _published_padding, mask)
        check_padded_loss(case, model, entries, case.inputs, published)
    _caches(case, model, out.past_key_values)
    if "short_logits_before_long" in outputs:
        length = outputs["short_logits_before_long"].shape[1]
        short = model(case.inputs["input_ids"][:, :length]).logits
        case.close("short logits after the long text", short, outputs["short_logits_before_long"])
        config = model.config
        channels = int(config.head_dim * config.mixer_options.get("collinear", {}).get("partial_rotary_factor", 1))
        reach = case.inputs["input_ids"].shape[1]
        stretched, _ = rope_frequencies(channels, config.rope_parameters, config.max_position_embeddings, reach)
        case.close("frequencies of the long text", stretched, outputs["inv_freq_after_long"])


def _published_padding(
    mask: Tensor, mixer: CollinearMixer, x: Tensor, *, layout: SequenceLayout, cache: None
) -> Tensor:
    """The published attention with padding: the lowest number added for the future and again for padded keys."""
    cos, sin = layout.rotary(mixer.rotary_dim, mixer.rope_parameters, mixer.max_position_embeddings)
    q, raw, v = (getattr(mixer, name)(x).unflatten(-1, (-1, mixer.head_dim)) for name in ("q_proj", "t_proj", "v_proj"))
    t = collinear_coefficients(raw, mixer.rotary_dim, tie=mixer.options.tie)
    query = collinear_query(q, cos, sin, form="slack", scale=mixer.head_dim**-0.5)
    keys, values = (
        z.repeat_interleave(mixer.heads // mixer.key_heads, dim=2)
        for z in (collinear_key(t, cos, sin, form="slack", tie=mixer.options.tie), v)
    )
    lowest = torch.finfo(x.dtype).min
    future = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).triu(1) * lowest
    scores = torch.einsum("bthk,bshk->bhts", query, keys) + (future + ((1 - mask) * lowest)[:, None, None])
    out = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), values)
    return mixer.o_proj(out.flatten(2))


def _decode(case: Case, family: str) -> None:
    model, _ = _model(case, family)
    inputs, outputs = dict(case.inputs), case.outputs
    mask, prefill = inputs.get("attention_mask"), outputs["prefill_logits"].shape[1]
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    assert ids.shape[1] == prefill + outputs["step_logits"].shape[1]

    def part(x: Tensor | None, start: int, end: int) -> Tensor | None:
        return None if x is None else x[:, start:end]

    with torch.no_grad():
        case.close("full", model(**inputs).logits, outputs["full_logits"], mask)
        cache, logits = model.new_cache(), []
        for start, end in ((0, prefill), *((t, t + 1) for t in range(prefill, ids.shape[1]))):
            step = model(
                ids[:, start:end],
                attention_mask=part(mask, 0, end),
                position_ids=part(positions, start, end),
                past_key_values=cache,
            )
            logits.append(step.logits)
    case.close("prefill", logits[0], outputs["prefill_logits"], part(mask, 0, prefill))
    steps = torch.cat(logits[1:], dim=1)
    case.close("steps", steps, outputs["step_logits"], part(mask, prefill, ids.shape[1]))
    _caches(case, model, cache)


def _caches(case: Case, model: FarspanPreTrainedModel, cache: FarspanCache) -> None:
    """The published code keeps rotated keys of full width, head first; ours their coefficients."""
    length, mask = case.inputs["input_ids"].shape[1], case.inputs.get("attention_mask")
    positions = case.inputs.get("position_ids", torch.arange(length).expand(len(case.inputs["input_ids"]), -1))
    for i, (block, memory) in enumerate(zip(model.base_model.blocks, cache.layers, strict=True)):
        held = {name: memory.tensors[name][:, :length] for name in ("keys", "values")}
        if f"cache_t.{i}" in case.outputs:
            keys = _rotated(block.mixer, held["keys"], positions)
            case.close(f"cache_t {i}", keys, case.outputs[f"cache_t.{i}"].transpose(1, 2), mask)
        if f"cache_v.{i}" in case.outputs:
            case.close(f"cache_v {i}", held["values"], case.outputs[f"cache_v.{i}"].transpose(1, 2), mask)


def _mixer(case: Case, options: CollinearOptions) -> CollinearMixer:
    config = case.config
    rope = {"rope_theta": float(config.get("rotary_emb_base", 10000))}
    if config.get("rope_scaling"):
        rope |= {"rope_type": config["rope_scaling"]["type"], "factor": config["rope_scaling"]["factor"]}
    shape = FarspanConfig(
        vocab_size=1,
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads"),
        mixers=["collinear"],
        max_position_embeddings=config["max_position_embeddings"],
        rope_parameters=rope,
    )
    return CollinearMixer(shape, options, layer_idx=0)


def _attention(case: Case, mixer: CollinearMixer, entries: list[AnyEntry]) -> None:
    mixer.load_state_dict(to_ours(case.params, entries))
    back = to_published(mixer.state_dict(), entries)
    for name, parameter in case.params.items():
        torch.testing.assert_close(back[name], parameter)
    x = case.inputs["hidden_states"].clone().requires_grad_()
    positions = case.inputs["position_ids"]
    out = mixer(x, layout=_layout(case, x))
    case.close("attn_output", out, case.outputs["attn_output"])
    loss = (out * case.inputs["cotangent"]).sum()
    case.close("loss", loss, case.outputs["loss"])
    loss.backward()
    theirs = dict(case.grads)
    input_gradient = {"hidden_states": theirs.pop("hidden_states")}
    ours = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None} | {"hidden_states": x.grad}
    case.close_gradients(ours, to_ours(theirs, entries, partial=True) | input_gradient)

    with torch.no_grad():
        cache = mixer.new_cache()
        mixer(x, layout=_layout(case, x), cache=cache)
        keys = _rotated(mixer, cache.tensors["keys"], positions)
        case.close("cache_t", keys.transpose(1, 2), case.outputs["cache_t"])
        case.close("cache_v", cache.tensors["values"].transpose(1, 2), case.outputs["cache_v"])
        case.close("attn_weights", _weights(mixer, x, keys, positions), case.outputs["attn_weights"])


def _layout(case: Case, x: Tensor) -> SequenceLayout:
    mask = case.inputs.get("attention_mask")
    return SequenceLayout(case.inputs["position_ids"], None if mask is None else mask.bool())


def _rotated(mixer: CollinearMixer, t: Tensor, positions: Tensor) -> Tensor:
    """The keys that the published code caches."""
    cos, sin = SequenceLayout(positions).rotary(mixer.rotary_dim, mixer.rope_parameters, mixer.max_position_embeddings)
    return collinear_key(t, cos, sin, form=mixer.options.form, tie=mixer.options.tie)


def _weights(mixer: CollinearMixer, x: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """Attention weights `[B, H, T, T]`, which the fused kernels do not return."""
    cos, sin = SequenceLayout(positions).rotary(mixer.rotary_dim, mixer.rope_parameters, mixer.max_position_embeddings)
    q = mixer.q_proj(x).unflatten(-1, (mixer.heads, mixer.head_dim))
    query = collinear_query(q, cos, sin, form=mixer.options.form, scale=mixer.head_dim**-0.5)
    keys = keys.repeat_interleave(mixer.heads // mixer.key_heads, dim=2)
    length = x.shape[1]
    seen = visible(length, length, causal=True, window=None, key_mask=None, cu_seqlens=None, device=x.device).unsqueeze(
        1
    )
    return torch.softmax(torch.einsum("bthk,bshk->bhts", query, keys).masked_fill(~seen, -torch.inf), dim=-1)
