"""Runners of the dilated attention kinds. The published code fills with zero keys and detaches the mixture."""

import torch
from torch import Tensor

from farspan.mixers import SequenceLayout
from farspan.mixers.dilated import DilatedMixer, DilatedOptions
from farspan.models.blocks import FarspanBlock
from farspan.models.configuration import FarspanConfig
from farspan.models.convert.longnet import attention_entries, relative_bias_entries
from farspan.models.convert.names import to_ours, to_published
from farspan.models.presets.longnet import TORCHSCALE
from farspan.nn.positions import apply_xpos, relative_position_bias, relative_position_bucket, xpos_scales
from farspan.ops import dilated_attention
from farspan.ops.dilated.patterns import DilatedSettings
from farspan.ops.dilated.reference import pattern_outputs, with_zero_keys
from tests.golden.case import Case
from tests.golden.model_cases import gradients, published_model


def operator(case: Case) -> None:
    config = case.config
    lengths, dilations = config["segment_length"], config["dilated_ratio"]
    for backend in ("reference", "torch"):
        leaves = {name: case.inputs[name].clone().requires_grad_() for name in ("q", "k", "v")}
        out = dilated_attention(
            **leaves,
            segment_lengths=lengths,
            dilations=dilations,
            causal=config["is_causal"],
            scale=config["scale"],
            backend=backend,
            **TORCHSCALE,
        )
        case.close(f"o ({backend})", out, case.outputs["o"])
        loss = (out * case.inputs["loss_weight"]).sum()
        case.close(f"loss ({backend})", loss.reshape(1), case.outputs["loss"])
        loss.backward()
        case.close_gradients({name: x.grad for name, x in leaves.items() if x.grad is not None}, case.grads)
    with torch.no_grad():
        # The fused form, which needs no gradient here.
        fused = dilated_attention(
            *leaves.values(),
            segment_lengths=lengths,
            dilations=dilations,
            causal=config["is_causal"],
            scale=config["scale"],
            **TORCHSCALE,
        )
        case.close("o (fused)", fused, case.outputs["o"])
        settings = DilatedSettings(
            tuple(zip(lengths, dilations, strict=True)),
            "block",
            causal=config["is_causal"],
            scale=config["scale"],
            zero_keys=True,
        )
        outs, lses = with_zero_keys(pattern_outputs, *leaves.values(), settings, [(0, out.shape[1])])
    for index, (part, lse) in enumerate(zip(outs, lses, strict=True)):
        case.close(f"pattern {index}", part, case.outputs[f"branch{index}_o"])
        lse = lse.masked_fill(lse.isneginf(), config["uncovered_lse"])
        case.close(f"log-sum-exp {index}", lse, case.outputs[f"branch{index}_lse"])


def attention(case: Case) -> None:
    config = case.config
    width, heads, xpos = config["embed_dim"], config["num_heads"], config["xpos_rel_pos"]
    options = DilatedOptions(
        segment_lengths=config["segment_length"],
        dilations=config["dilated_ratio"],
        positions="xpos" if xpos else "none",
        xpos_scale_base=config["xpos_scale_base"],
        attention_bias=True,
        sub_norm=config["subln"],
        norm_eps=config["layernorm_eps"],
        **TORCHSCALE,
    )
    shape = FarspanConfig(
        vocab_size=1, hidden_size=width, num_attention_heads=heads, mixers=["dilated"], causal=config["is_causal"]
    )
    mixer = DilatedMixer(shape, options, layer_idx=0)
    entries = attention_entries(width // heads, xpos, config["subln"])
    mixer.load_state_dict(to_ours(case.params, entries))
    written = to_published(mixer.state_dict(), entries)
    assert written.keys() == case.params.keys()
    for name, x in written.items():
        case.close(name, x, case.params[name])

    x = case.inputs["x"].clone().requires_grad_()
    layout = SequenceLayout(torch.arange(x.shape[1]).expand(x.shape[0], -1))
    out = mixer(x, layout=layout)
    case.close("o", out, case.outputs["o"])
    loss = (out * case.inputs["loss_weight"]).sum()
    case.close("loss", loss.reshape(1), case.outputs["loss"])
    loss.backward()
    theirs = dict(case.grads)
    of_input = {name: theirs.pop(name) for name in list(theirs) if name.startswith("input.")}
    ours = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None} | {"input.x": x.grad}
    case.close_gradients(ours, to_ours(theirs, entries, partial=True) | of_input)


def xpos_and_relative_bias(case: Case) -> None:
    """The source centres xPos at half of the length; a last token with an offset stands behind that many others."""
    config = case.config
    q, scale_base, offset = case.inputs["q"].unsqueeze(2), config["scale_base"], config["offset"]
    length = q.shape[1]

    def turned(x: Tensor, positions: Tensor, whole: int, key: bool = False) -> Tensor:
        return apply_xpos(x, positions[None], scale_base, key=key, centre=-(-whole // 2)).squeeze(2)

    places = torch.arange(length)
    case.close("scales", xpos_scales(config["head_dim"]).float(), case.outputs["scale_buffer"])
    case.close("queries", turned(q, places, length), case.outputs["xpos_q"])
    case.close("keys", turned(q, places, length, key=True), case.outputs["xpos_k"])
    last = turned(q[:, -1:], torch.tensor([offset]), offset + 1)
    case.close("last token", last, case.outputs["xpos_last_offset"])

    for name, bidirectional in (("bi", True), ("uni", False)):
        bucket = case.outputs[f"bucket_{name}"]
        reach = (len(bucket) + 1) // 2
        relative = torch.arange(1 - reach, reach)
        ours = relative_position_bucket(relative, config["num_buckets"], config["max_distance"], bidirectional)
        assert torch.equal(ours, bucket)
        prefix = f"rel_{name}."
        published = {key.removeprefix(prefix): x for key, x in case.params.items() if key.startswith(prefix)}
        weight = to_ours(published, relative_bias_entries())["relative_bias"]
        bias = case.outputs[f"bias_{name}"]
        table = relative_position_bias(weight, bias.shape[-1], config["max_distance"], bidirectional)
        distance = torch.arange(bias.shape[-1]) - torch.arange(bias.shape[-2]).unsqueeze(1)
        dense = table[:, bias.shape[-1] - 1 + distance].repeat(len(bias) // config["n_heads"], 1, 1)
        case.close(f"bias {name}", dense, bias)


def decoder_lm(case: Case) -> None:
    """Hidden states are those of the embedding and of every layer, before the last norm."""
    model, entries = published_model(case, "longnet-decoder")
    ids, outputs = case.inputs["input_ids"], _layer_outputs(model.model.blocks)
    out = model(ids, labels=ids, output_hidden_states=True)
    for i, hidden in enumerate([out.hidden_states[0], *outputs]):
        case.close(f"hidden {i}", hidden, case.outputs[f"hidden.{i}"])
    assert f"hidden.{len(outputs) + 1}" not in case.outputs
    case.close("logits", out.logits, case.outputs["logits"])
    case.close("loss", out.loss.reshape(1), case.outputs["loss"])
    out.loss.backward()
    case.close_gradients(gradients(model, entries), case.grads)


def encoder(case: Case) -> None:
    """The published encoder zeroes padded inputs and then takes them for tokens: here they are tokens of zeros."""
    model, entries = published_model(case, "longnet-encoder")
    x, real = case.inputs["x"].clone().requires_grad_(), ~case.inputs["encoder_padding_mask"]
    out = model(inputs_embeds=x * real.unsqueeze(-1)).last_hidden_state
    case.close("encoder_out", out, case.outputs["encoder_out"], real)
    loss = (out * case.inputs["loss_weight"]).sum()
    case.close("loss", loss.reshape(1), case.outputs["loss"])
    loss.backward()
    case.close_gradients(gradients(model, entries) | {"input.x": x.grad}, case.grads)


def _layer_outputs(layers: list[FarspanBlock]) -> list[Tensor]:
    """What each layer returns at the next forward, in order."""
    found: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
    return found


def longvit(case: Case) -> None:
    """Features are the states of the patches; without a head the logits are their mean."""
    model, entries = published_model(case, "longvit")
    out = model(case.inputs["image"], output_hidden_states=True)
    features = out.hidden_states[-1]
    case.close("features", features, case.outputs["features"])
    case.close("mean", out.logits, case.outputs["features"].mean(1))
    loss = (features * case.inputs["loss_weight"]).sum()
    case.close("loss", loss.reshape(1), case.outputs["loss"])
    loss.backward()
    case.close_gradients(gradients(model, entries), case.grads)
