"""Runners of the dynamic-mask attention kinds."""

from typing import Any

import torch
from torch import Tensor

from farspan.mixers import SequenceLayout
from farspan.mixers.dynamic_mask import DynamicMaskMixer, DynamicMaskOptions
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.doge import attention_entries, attention_options
from farspan.models.convert.names import to_ours, to_published
from farspan.ops import dynamic_mask_attention
from farspan.ops.dynamic_mask.reference import Selection, kept_keys
from farspan.ops.softmax.reference import visible
from tests.golden.case import Case


def seed_module(case: Case) -> None:
    _attention(case, select="none", rope=False)


def seed_doge(case: Case) -> None:
    assert not case.config["dynamic_mask_ratio"], "a ratio drops keys by looking at the future; not required"
    _attention(case, select="none", bias_form="none" if case.config["is_causal"] else "exp")


def top_per_row(case: Case) -> None:
    """small-doge and transformers: each row keeps its own best visible keys."""
    _attention(
        case,
        keep_window_size=case.config["keep_window_size"],
        sliding_window=case.config.get("sliding_window"),
        norm_eps=case.config.get("rms_norm_eps", 1e-6),
    )


def fsa_attention(case: Case) -> None:
    """The newest form: no exponential, one selection for all rows."""
    _attention(
        case,
        bias_form="linear",
        select="topk_global",
        keep_window_size=case.config["window_size"],
        norm_eps=case.config.get("rms_norm_eps", 1e-6),
    )


def fsa_kernel(case: Case) -> None:
    """Inputs are head-first; the mask of a broadcast selection is compared before causality."""
    config = case.config
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in ("query", "key", "value", "attn_bias")}
    q, k, v = (leaves[name].transpose(1, 2) for name in ("query", "key", "value"))
    per_row = leaves["attn_bias"].shape[2] > 1
    bias = leaves["attn_bias"] if per_row else leaves["attn_bias"].squeeze(2).transpose(1, 2)
    select = {"topk": "topk_causal" if per_row else "topk_global", "relu": "relu"}[config["mask_type"]]
    settings: dict[str, Any] = {
        "select": "none" if config["mask_kind"] == "nomask" else select,
        "keep": config["window_size"],
        "block_size": config["block_size"],
        "causal": config["is_causal"],
    }
    kept = kept_keys(bias, q.shape[1], Selection(**settings))
    seen = kept.repeat_interleave(q.shape[2] // kept.shape[1], dim=1)
    assert torch.equal(seen, case.outputs["visible"].bool()), f"{case.name}: visible"
    if "attn_mask" in case.outputs:
        chosen = kept_keys(bias, q.shape[1], Selection(**(settings if per_row else {**settings, "causal": False})))
        chosen = chosen if per_row else chosen[:, :, :1]
        assert torch.equal(chosen, case.outputs["attn_mask"].bool()), f"{case.name}: attn_mask"
    for backend in ("reference", "torch"):
        out = dynamic_mask_attention(q, k, v, bias, scale=config["softmax_scale"], backend=backend, **settings)
        case.close("attn_output", out, case.outputs["attn_output"])
        loss = (out * case.inputs["loss_weight"]).sum()
        case.close("loss", loss, case.outputs["loss"])
        gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        case.close_gradients(dict(zip(leaves, gradients, strict=True)), case.grads)


def _attention(case: Case, **options: Any) -> None:
    mixer, entries = _mixer(case, options)
    x, mask = case.inputs["hidden_states"], _real(case)
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    layout = SequenceLayout(positions, mask)
    if "cos" in case.inputs:
        for ours, name in zip(layout.rotary(mixer.head_dim, mixer.rope_parameters, 1), ("cos", "sin"), strict=True):
            case.close(name, torch.cat((ours, ours), -1)[:1], case.inputs[name])
    case.close("hidden_states", mixer(x, layout=layout), case.outputs["hidden_states"], mask)

    # The loss reads the rows of padding too, which see the real keys before them.
    q, k, v = mixer.project(x, layout)
    bias = mixer.key_bias(v)
    _check_bias(case, options, bias)
    chosen = mixer.options
    settings: dict[str, Any] = {
        "select": chosen.selection,
        "keep": chosen.keep_window_size,
        "window": chosen.sliding_window,
        "key_mask": mask,
    }
    _check_selection(case, kept_keys(bias, x.shape[1], Selection(**settings)), mask)
    if "attn_weights" in case.outputs:
        identity = torch.eye(x.shape[1])[None, :, None].expand(len(x), -1, k.shape[2], -1)
        weights = dynamic_mask_attention(q, k, identity, bias, **settings).transpose(1, 2)
        case.close("attn_weights", _rowwise(weights), _rowwise(case.outputs["attn_weights"]), mask)
    for backend in ("reference", "torch"):
        out = mixer.o_proj(dynamic_mask_attention(q, k, v, bias, backend=backend, **settings).flatten(2))
        case.close(f"hidden_states ({backend})", out, case.outputs["hidden_states"], mask)
        if case.gradients:
            loss = (out * case.inputs["loss_weight"]).sum()
            case.close("loss", loss, case.outputs["loss"])
            mixer.zero_grad()
            loss.backward(retain_graph=True)
            ours = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
            case.close_gradients(ours, _without_noise(mixer, ours, to_ours(case.grads, entries, partial=True)))


def _mixer(case: Case, options: dict[str, Any]) -> tuple[DynamicMaskMixer, list]:
    config = case.config
    heads = config.get("num_attention_heads") or config["n_heads"]
    width = config.get("hidden_size") or config["d_model"]
    head_dim = config.get("head_dim") or width // heads
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    shape = FarspanConfig(
        vocab_size=1,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads"),
        head_dim=head_dim,
        mixers=["dynamic_mask"],
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rope_parameters=rope,
    )
    found = attention_options({name: tuple(x.shape) for name, x in case.params.items()}, head_dim)
    mixer = DynamicMaskMixer(shape, DynamicMaskOptions(**found, **options), layer_idx=0)
    biased = options.get("bias_form") != "none"
    entries = attention_entries(bias=bool(found["attention_bias"]), qk_norm=bool(found["qk_norm"]), biased=biased)
    state = {name: x for name, x in case.params.items() if biased or not name.startswith(("A", "dt_proj"))}
    mixer.load_state_dict(to_ours(state, entries))
    back = to_published(mixer.state_dict(), entries)
    assert all(torch.equal(back[name], x) for name, x in state.items()), f"{case.name}: round trip"
    return mixer, entries


def _without_noise(mixer: DynamicMaskMixer, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without positions a bias of all keys shifts the scores of a query alike: its gradient is 0 and rounding."""
    name = "k_proj.bias"
    if name in theirs and not mixer.options.rope and mixer.k_norm is None:
        largest = theirs["k_proj.weight"].abs().max()
        assert max(ours[name].abs().max(), theirs[name].abs().max()) < 1e-5 * largest
        return {other: gradient for other, gradient in theirs.items() if other != name}
    return theirs


def _check_bias(case: Case, options: dict[str, Any], bias: Tensor) -> None:
    if "dynamic_bias" in case.outputs:
        if options.get("bias_form") == "none":  # published beside an attention that does not use it
            mixer, _ = _mixer(case, {**options, "bias_form": "exp"})
            x = case.inputs["hidden_states"]
            bias = mixer.key_bias(mixer.v_proj(x).unflatten(-1, (mixer.key_heads, mixer.head_dim)))
        case.close("dynamic_bias", bias.transpose(1, 2), case.outputs["dynamic_bias"].reshape(*bias.mT.shape))
    if "attn_bias" in case.outputs:
        case.close("attn_bias", bias.transpose(1, 2).unsqueeze(2), case.outputs["attn_bias"])


def _check_selection(case: Case, kept: Tensor, real: Tensor | None) -> None:
    for name in ("kept_mask", "visible"):
        if name in case.outputs:
            theirs = case.outputs[name].bool()
            ours = kept.repeat_interleave(theirs.shape[1] // kept.shape[1], dim=1)
            differ = _rowwise((ours != theirs).float()).flatten(2).any(-1)
            assert not (differ if real is None else differ & real).any(), f"{case.name}: {name}"


def _rowwise(x: Tensor) -> Tensor:
    """`[B, H, T, S]` → `[B, T, H, S]`, so that rows of padding can be left out."""
    return x.transpose(1, 2)


def _real(case: Case) -> Tensor | None:
    """`[B, S]` bool from a mask of any published form, or None where every key is real."""
    for name in ("attention_mask_2d", "attention_mask", "attention_mask_4d"):
        if name in case.inputs:
            mask = case.inputs[name]
            if mask.dim() == 2:
                return mask.bool()
            sees = _visible(mask)
            causal = visible(
                *mask.shape[2:], causal=True, window=None, key_mask=None, cu_seqlens=None, device=mask.device
            )
            real = sees.any(1)
            window = case.config.get("sliding_window")
            assert window or torch.equal(sees, causal & real.unsqueeze(1)), f"{case.name}: neither causal nor padding"
            return None if real.all() else real.expand(len(case.inputs["hidden_states"]), -1)
    return None


def _visible(mask: Tensor) -> Tensor:
    """`[B, 1, T, S]`, boolean or additive, as `[B, T, S]` bool."""
    mask = mask.squeeze(1)
    return mask if mask.dtype == torch.bool else mask == 0
