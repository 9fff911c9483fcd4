"""Models of images and of tiles: what they read, what they classify, over every mixer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from farspan import FarspanConfig, FarspanForImageClassification
from farspan.errors import ConfigError, ShapeError
from farspan.mixers.base import MIXERS
from farspan.models.vision_options import VisionOptions
from tests import tolerances
from tests.models.conftest import MIXES

PIXELS = {"image_size": [16, 24], "patch_size": 8, "num_channels": 2}
TILES = {"input": "features", "num_channels": 5, "positions": "sincos", "grid_size": 20, "tile_size": 16}
# Every query sees every key, and no layer knows of places beside what the tokens bring along.
DENSE: dict[str, Any] = {"mixers": ["softmax"], "mixer_options": {"softmax": {"rope": False}}, "causal": False}


def tiny(vision: dict[str, Any], **overrides: Any) -> FarspanForImageClassification:
    """A model in evaluation mode with every zero-initialised parameter perturbed."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 0,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "initializer_range": 0.3,
        "num_labels": 3,
        "classifier_bias": True,
        "vision": vision,
    }
    model = FarspanForImageClassification(FarspanConfig(**{**fields, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return model


def image(rows: int = 2, height: int = 16, width: int = 24) -> Tensor:
    return torch.randn(rows, 2, height, width, generator=torch.Generator().manual_seed(2))


def tiles(rows: int = 2, number: int = 9) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    places = torch.randint(0, 20 * 16, (rows, number, 2), generator=made)
    return {"features": torch.randn(rows, number, 5, generator=made), "coordinates": places}


@pytest.mark.parametrize("causal", [True, False])
def test_every_mixer_reads_images_and_tiles(mix: str, causal: bool) -> None:
    if not causal and not all(MIXERS.get(name)[0].bidirectional for name in MIXES[mix]["mixers"]):
        pytest.skip(f"{mix} looks back only")
    of_text = {"type_vocab_size": 0, "position_embedding": "none"}
    for vision, given in (({**PIXELS, "class_token": True}, {"pixel_values": image()}), (TILES, tiles())):
        model = tiny(vision, **{**MIXES[mix], **of_text, "causal": causal, "num_key_value_heads": 2})
        out = model(**given, labels=torch.tensor([0, 2]))
        assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([0, 2])))
        out.loss.backward()
        unreached = [name for name, x in model.named_parameters() if x.grad is None or not x.grad.isfinite().all()]
        assert not unreached


def test_patches_are_read_row_after_row_with_their_positions() -> None:
    model = tiny(PIXELS)
    tokens = model.embeddings(image())
    weight, bias = model.embeddings.projection.weight, model.embeddings.projection.bias
    for place, (top, left) in enumerate((y, x) for y in (0, 8) for x in (0, 8, 16)):
        patch = image()[:, :, top : top + 8, left : left + 8]
        expected = torch.einsum("bcyx,dcyx->bd", patch, weight) + bias + model.embeddings.positions[place]
        assert_close(tokens[:, place], expected, rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)


@pytest.mark.parametrize("positions", ["learned", "sincos", "none"])
def test_images_of_other_sizes(positions: str) -> None:
    model = tiny({**PIXELS, "positions": positions})
    bare = tiny({**PIXELS, "positions": "none"})
    bare.load_state_dict(model.state_dict(), strict=False)
    wide = image(height=32, width=40)
    with torch.no_grad():
        assert model(wide).logits.isfinite().all()
        added = (model.embeddings(wide) - bare.embeddings(wide)).unflatten(1, (4, 5))
        trained = (model.embeddings(image()) - bare.embeddings(image())).unflatten(1, (2, 3))
    expected = F.interpolate(trained.permute(0, 3, 1, 2), size=(4, 5), mode="bicubic").permute(0, 2, 3, 1)
    assert_close(added, expected, rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)
    assert bool(added.any()) == (positions != "none")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
def test_which_state_is_classified(causal: bool, class_token: bool) -> None:
    vision = {**PIXELS, "class_token": class_token, "pooled_norm": True}
    for chosen in (None, "mean", "first", "last"):
        model = tiny(vision, causal=causal, classifier_pooling=chosen, norm_type="layer_norm")
        out = model(image(), output_hidden_states=True)
        states = out.hidden_states[-1]
        assert states.shape[1] == 6 + class_token
        patches = states if not class_token else states[:, :-1] if causal else states[:, 1:]
        own = "last" if causal else "first" if class_token else "mean"
        expected = {"mean": patches.mean(1), "first": states[:, 0], "last": states[:, -1]}[chosen or own]
        logits = model.classifier(F.layer_norm(expected, (32,), model.pooled_norm.weight, model.pooled_norm.bias, 1e-6))
        assert_close(out.logits, logits)
        without = tiny(vision, causal=causal, classifier_pooling=chosen, norm_type="layer_norm", num_labels=0)
        assert without(image()).logits.shape == (2, 32)


@pytest.mark.parametrize("causal", [True, False])
def test_the_class_token_sees_every_patch(causal: bool) -> None:
    model = tiny({**PIXELS, "class_token": True}, causal=causal)
    pixels = image().requires_grad_()
    model(pixels).logits.sum().backward()
    reached = F.unfold(pixels.grad, 8, stride=8).abs().sum(1)
    assert (reached > 0).all()


@pytest.mark.parametrize("mixer", ["softmax", "dilated"])
@pytest.mark.parametrize("class_token", [True, False])
def test_the_order_of_the_tiles_means_nothing_to_a_dense_model(mixer: str, class_token: bool) -> None:
    options = (
        {"segment_lengths": [64], "dilations": [1], "positions": "none"} if mixer == "dilated" else {"rope": False}
    )
    model = tiny({**TILES, "class_token": class_token}, mixers=[mixer], mixer_options={mixer: options}, causal=False)
    given = tiles()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(**given).logits
        after = model(**{name: x[:, order] for name, x in given.items()}).logits
        moved = model(features=given["features"][:, order], coordinates=given["coordinates"]).logits
    assert_close(after, before, rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)
    assert (moved - before).abs().max() > 100 * tolerances.FLOAT32


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mix", ["hybrid", "dilated", "cosine"])
def test_padded_tiles_take_no_part(mix: str, causal: bool, pooling: str) -> None:
    model = tiny({**TILES, "class_token": True}, **{**MIXES[mix], "causal": causal, "classifier_pooling": pooling})
    given, padding = tiles(1, 7), tiles(1, 4)
    for places in ([0, 1, 2, 3], [7, 8, 9, 10], [0, 3, 6, 10]):
        mask = torch.ones(1, 11, dtype=torch.long)
        mask[:, places] = 0
        padded = {name: torch.empty(1, 11, x.shape[-1], dtype=x.dtype) for name, x in given.items()}
        for name, x in padded.items():
            x[:, mask[0] == 1], x[:, mask[0] == 0] = given[name], padding[name]
        padded["coordinates"][:, places[0]] = -1
        with torch.no_grad():
            ours, expected = model(**padded, attention_mask=mask).logits, model(**given).logits
        assert_close(ours, expected, rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)


@pytest.mark.parametrize(
    ("labels", "number", "loss"),
    [
        (torch.tensor([1, 0]), 3, F.cross_entropy),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), 3, F.binary_cross_entropy_with_logits),
        (torch.tensor([[0.5], [2.0]]), 1, F.mse_loss),
    ],
)
def test_problem_types(labels: Tensor, number: int, loss: Any) -> None:
    model = tiny(PIXELS, num_labels=number)
    out = model(image(), labels=labels)
    assert_close(out.loss, loss(out.logits, labels))


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny({**PIXELS, "class_token": True}, **DENSE).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(image(), labels=torch.tensor([1, 0])).loss.backward()
        found.append({name: x.grad for name, x in model.named_parameters()})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient)


def test_compiles_without_a_break() -> None:
    model = tiny({**TILES, "class_token": True}, **DENSE)
    given = tiles()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(**given).logits, model(**given).logits)


def test_the_initial_state_is_the_same_each_time_and_of_the_asked_size() -> None:
    fields = {**DENSE, "hidden_size": 256, "initializer_range": 0.05}
    first, second = (tiny({**PIXELS, "image_size": 64, "class_token": True}, **fields) for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    for x in (first.embeddings.class_token, first.embeddings.positions, first.classifier.weight):
        assert x.std().item() == pytest.approx(0.05, rel=0.15)


def test_auto_class_and_pipeline(tmp_path: Path) -> None:
    """Images are scaled and cut by any image processor of transformers; ours would do nothing that these do not."""
    from PIL import Image
    from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline

    names = {0: "cat", 1: "dog", 2: "bird"}
    model = tiny({"image_size": 32, "patch_size": 8}, id2label=names)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is FarspanForImageClassification and loaded.config.id2label == names
    pixels = torch.randn(1, 3, 32, 32)
    assert_close(loaded(pixels).logits, model(pixels).logits)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    classify = pipeline("image-classification", model=loaded, image_processor=processor)
    picture = Image.new("RGB", (50, 40), (200, 30, 60))
    answers = classify(picture)
    expected = loaded(processor(picture, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0]
    assert [answer["label"] for answer in answers] == [names[int(i)] for i in expected.argsort(descending=True)]
    assert answers[0]["score"] == pytest.approx(expected.max().item(), rel=tolerances.FLOAT32)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vision": {"patch": 8}}, "did you mean 'patch_size'"),
        ({"vision": {"patch_size": "8"}}, "wrong type"),
        ({"vision": {"image_size": 30, "patch_size": 8}}, "divisible by patch_size=8"),
        ({"vision": {"image_size": [8, 8, 8], "patch_size": 8}}, "height and width"),
        ({"vision": {"num_channels": 0}}, "must be positive"),
        ({"vision": {"interpolation_offset": 1.0}}, r"must lie in \[0, 1\)"),
        ({"vision": {"input": "features"}}, "'features' take 'sincos' or 'none'"),
        ({"vision": {"input": "sound"}}, "wrong type"),
        ({"vocab_size": 7}, "set vocab_size=0"),
        ({"type_vocab_size": 2}, "set type_vocab_size=0"),
        ({"position_embedding": "learned"}, "set position_embedding='none'"),
        ({"pooler": True}, "set pooler=False"),
        ({"vision": {"positions": "sincos"}, "hidden_size": 30, "num_attention_heads": 3}, "choose 32"),
    ],
)
def test_senseless_descriptions_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(**{"vision": PIXELS, **fields})


def test_a_model_of_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the field vision"):
        FarspanForImageClassification(FarspanConfig(vocab_size=9, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ConfigError, "give pixel_values"),
        ({"pixel_values": image(), "attention_mask": torch.ones(2, 6)}, ConfigError, "and nothing else"),
        ({"pixel_values": image(width=20)}, ShapeError, "patch_size=8 divides"),
        ({"pixel_values": torch.randn(1, 3, 16, 24)}, ShapeError, r"expected \[B, 2, height, width\]"),
        ({"pixels": image()}, ConfigError, "did you mean 'pixel_values'"),
    ],
)
def test_images_that_do_not_fit_are_refused(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny(PIXELS)(**given)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"pixel_values": image()}, ConfigError, "give features"),
        ({"features": torch.randn(1, 4, 6)}, ShapeError, r"num_channels=5"),
        ({"features": torch.randn(1, 4, 5)}, ShapeError, "got none"),
        ({"features": torch.randn(1, 4, 5), "coordinates": torch.zeros(1, 3, 2)}, ShapeError, r"got \[1, 3, 2\]"),
        ({**tiles(), "attention_mask": torch.ones(2, 8)}, ShapeError, r"expected \[B=2, N=9\]"),
        ({"features": torch.randn(1, 1, 5), "coordinates": torch.full((1, 1, 2), 320)}, ShapeError, "reach tile 20"),
        ({"features": torch.randn(1, 1, 5), "coordinates": torch.full((1, 1, 2), -1)}, ShapeError, "tile -1"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny(TILES)(**given)


def test_the_grid_of_the_trained_size() -> None:
    assert VisionOptions(image_size=64, patch_size=16).grid == (4, 4)
    assert VisionOptions(image_size=[32, 64], patch_size=16).grid == (2, 4)
