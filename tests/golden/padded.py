"""Losses of cases with padding on the left, whose published value scores a row that means nothing.

Labels are shifted, so that the last padded row predicts the first real token. What the published code computes there
follows from the lowest number of float32 being added to all its scores. That way is taken in the tests alone: once, for
the published loss and gradients; and where no padded row is scored, ours have to be the same as that way's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from farspan.mixers import SequenceLayout
from farspan.mixers.base import Mixer
from farspan.mixers.dynamic_mask import DynamicMaskMixer
from farspan.models.convert.names import AnyEntry
from farspan.models.modeling import FarspanPreTrainedModel
from tests.golden.case import Case
from tests.golden.model_cases import gradients

Forward = Callable[..., Tensor]


def check_padded_loss(
    case: Case,
    model: FarspanPreTrainedModel,
    entries: list[AnyEntry],
    inputs: dict[str, Tensor],
    published: Callable[[Mixer], Forward | None],
) -> None:
    """Compares loss and gradients of a case with an `attention_mask`.

    Args:
        inputs: arguments of the model, `labels` and `attention_mask` among them.
        published: a mixer → its forward with the published rows at padding, or None where they are ours.
    """
    mask = inputs["attention_mask"]
    real = {**inputs, "labels": inputs["labels"].clone()}
    real["labels"][:, 1:][mask[:, :-1] == 0] = -100
    ours = _loss_and_gradients(model, entries, real)
    mixers = [block.mixer for block in model.base_model.blocks]
    for mixer in mixers:
        if (forward := published(mixer)) is not None:
            mixer.forward = forward
    loss, found = _loss_and_gradients(model, entries, inputs)
    theirs = _loss_and_gradients(model, entries, real)
    for mixer in mixers:
        mixer.__dict__.pop("forward", None)
    case.close("loss", loss, case.outputs["loss"])
    case.close_gradients(found, case.grads)
    case.close("loss of real rows", ours[0], theirs[0])
    case.close_gradients(ours[1], theirs[1])


def all_alike(mixer: DynamicMaskMixer, mask: Tensor, added: bool = False) -> Forward:
    """Dynamic mask attention whose padded rows weigh every key alike, padding and future included.

    Their scores are the lowest number, which rounds away what is added to it but not its gradient.

    Args:
        mixer: of the layer.
        mask: `[B, T]`, 1 for real tokens.
        added: whether the bias is added to the lowest number (the seed's Doge); elsewhere that takes its place.
    """
    forward = mixer.forward

    def published(x: Tensor, *, layout: SequenceLayout, cache: None) -> Tensor:
        q, k, v = mixer.project(x, layout)
        keys, values = (z.repeat_interleave(mixer.heads // mixer.key_heads, dim=2) for z in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, keys) * mixer.head_dim**-0.5
        if added:
            bias = mixer.key_bias(v).repeat_interleave(mixer.heads // mixer.bias_heads, dim=2)
            scores = scores + bias.transpose(1, 2).unsqueeze(2)
        weights = (scores + torch.finfo(x.dtype).min).softmax(-1)
        alike = mixer.o_proj(torch.einsum("bhts,bshv->bthv", weights, values).flatten(2))
        return torch.where(mask.bool().unsqueeze(-1), forward(x, layout=layout, cache=cache), alike)

    return published


def _loss_and_gradients(
    model: FarspanPreTrainedModel, entries: list[AnyEntry], inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss, {name: x.clone() for name, x in gradients(model, entries).items()}
