"""Runners of the CoCA kinds."""

import torch
from torch import Tensor

from farspan.mixers import SequenceLayout
from farspan.mixers.collinear import CollinearMixer, CollinearOptions
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.coca import llama_attention_entries, neox_attention_entries
from farspan.models.convert.names import AnyEntry, to_ours, to_published
from farspan.nn.positions import rope_frequencies, rotary_table
from farspan.ops import collinear_attention, collinear_coefficients
from farspan.ops.collinear.reference import collinear_key, collinear_query
from farspan.ops.softmax.reference import visible
from tests.golden.case import Case


def llama_attention(case: Case) -> None:
    _attention(case, _mixer(case, CollinearOptions()), llama_attention_entries())


def neox_attention(case: Case) -> None:
    config = case.config
    factor = config["rotary_pct"]
    options = CollinearOptions(partial_rotary_factor=factor, tie="head", attention_bias=True)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    entries = neox_attention_entries(width, heads, int(width // heads * factor), config["rotary_emb_base"])
    _attention(case, _mixer(case, options), entries)


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
