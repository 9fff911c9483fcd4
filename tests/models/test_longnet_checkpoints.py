"""MetaLA's and torchscale's families: defaults of the published code, refusals, and GigaPath against its formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from farspan import FarspanForImageClassification, presets
from farspan.errors import CheckpointError
from farspan.models.convert import families
from farspan.models.convert.families import Published
from farspan.models.convert.names import to_ours
from farspan.models.presets.longnet import longnet_block
from tests import tolerances
from tests.models.tiny_families import TINY, family_of, published_checkpoint


def published(case: str, **changes: Any) -> Published:
    """A tiny checkpoint, its config changed; None takes a field away."""
    _, config, state = published_checkpoint(case)
    config = {name: value for name, value in {**config, **changes}.items() if name not in changes or value is not None}
    return Published(config, {name: tuple(x.shape) for name, x in state.items()})


def bare(case: str) -> Published:
    return Published({}, published(case).shapes)


@pytest.mark.parametrize(
    "case", ["metala", "metala/tied", "metala-neox", "metala-neox/tied", "longvit", "gigapath/mean"]
)
def test_names_alone_tell_the_family_and_the_sizes(case: str) -> None:
    assert families.detect(bare(case)) is family_of(case)
    config, real = family_of(case).read_config(bare(case)), TINY[case]()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(real, name), name


def test_decoder_and_encoder_with_embeddings_are_not_guessed() -> None:
    with pytest.raises(CheckpointError, match="longnet-decoder, longnet-encoder; name one with --family"):
        families.detect(bare("longnet-decoder"))
    assert families.detect(published("longnet-decoder")).name == "longnet-decoder"
    assert families.detect(bare("longnet-encoder")).name == "longnet-encoder"


def test_patterns_are_read_from_text_without_evaluating_it() -> None:
    family = families.get("longnet-decoder")
    config = family.read_config(published("longnet-decoder", segment_length="[8, 16]", dilated_ratio="[1,2]"))
    assert config.mixer_options["dilated"]["segment_lengths"] == [8, 16]
    for text in ("__import__('os').getcwd()", "[8, 16", "8", "[1.5]", "[true]", []):
        with pytest.raises(CheckpointError, match="as lists of integers"):
            family.read_config(published("longnet-decoder", segment_length=text))


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("metala", {"glu_act": "1+elu"}, "glu_act='1\\+elu'"),
        ("metala-neox", {"pos_emb": "learned"}, "pos_emb='learned'"),
        ("metala-neox", {"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
        ("metala-neox", {"norm": "scalenorm"}, "'layernorm' or 'rmsnorm'"),
        ("longnet-decoder", {"dilated_ratio": None}, "dilated_ratio=None; give segment_length"),
        ("longnet-decoder", {"rel_pos_buckets": 32}, "rel_pos_buckets=32"),
        ("longnet-decoder", {"multiway": True}, "multiway=True"),
        ("longnet-encoder", {"moe_freq": 2}, "moe_freq=2"),
        ("longnet-encoder", {"activation_dropout": 0.1}, "activation_dropout=0.1"),
        ("longvit", {"activation_fn": "gelu_accurate"}, "activation_fn"),
        ("gigapath", {"deepnorm": True}, "deepnorm=True"),
    ],
)
def test_settings_that_change_the_result_are_refused(case: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        family_of(case).read_config(published(case, **changes))


def test_heads_that_farspan_has_not_are_refused() -> None:
    encoder = published("longnet-encoder")
    with pytest.raises(CheckpointError, match="output_projection"):
        families.get("longnet-encoder").read_config(
            Published(encoder.config, {**encoder.shapes, "output_projection.weight": (61, 32)})
        )
    slide = bare("gigapath")
    fine_tuned = Published({}, {f"slide_encoder.{name}": shape for name, shape in slide.shapes.items()})
    assert families.detect(fine_tuned).name == "gigapath"
    with pytest.raises(CheckpointError, match="Convert the slide encoder"):
        families.get("gigapath").read_config(fine_tuned)


def test_what_torchscale_cannot_compute_is_not_written_as_if_it_could() -> None:
    with pytest.raises(CheckpointError, match="head_offset='block'"):
        families.get("longnet-decoder").write_config(presets.get("longnet-125m"))


def test_defaults_of_longvit_follow_the_size_of_the_image() -> None:
    shapes = {**bare("longvit/backbone").shapes, "patch_embed.proj.weight": (32, 3, 32, 32)}
    for side, widest in ((32, 1024), (128, 16384), (256, 65536), (1024, 1048576)):
        read = families.get("longvit").read_config(Published({}, {**shapes, "pos_embed": (1, side**2, 32)}))
        assert read.vision["image_size"] == 32 * side
        assert read.mixer_options["dilated"]["segment_lengths"][-1] == widest
        assert read.num_attention_heads == 16 and read.num_labels == 0


def test_gigapath_as_it_is_released_has_no_config_and_is_the_preset() -> None:
    preset = presets.get("gigapath-slide-encoder")
    with torch.device("meta"):
        state = FarspanForImageClassification(preset).state_dict()
    shapes = {
        entry.published: tuple(state[entry.ours].shape) if entry.published_shape is None else entry.published_shape
        for entry in families.get("gigapath").entries(preset)
    }
    assert families.get("gigapath").read_config(Published({}, shapes)).to_dict() == preset.to_dict()


@pytest.mark.parametrize("case", ["gigapath", "gigapath/mean"])
def test_gigapath_is_what_its_code_computes(case: str) -> None:
    """One dense pattern; places, class token, layers, both norms and pooling from the published names alone."""
    heads, width = 4, 32
    _, config, state = published_checkpoint(case)
    config |= {"segment_length": [64], "dilated_ratio": [1], "slide_ngrids": 7}
    made = torch.Generator().manual_seed(0)
    tiles = torch.randn(2, 11, 24, generator=made)
    places = torch.rand(2, 11, 2, generator=made) * 7 * 256

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def wave(number: Tensor) -> Tensor:
        angles = number.unsqueeze(-1) / 10000 ** (torch.arange(width // 4) / (width // 4))
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    grid = (places / 256).floor()
    x = linear(tiles, "patch_embed.proj") + torch.cat((wave(grid[..., 1]), wave(grid[..., 0])), dim=-1)
    x = torch.cat((state["cls_token"].expand(2, 1, width), x), dim=1)
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        y = norm(x, f"{layer}.self_attn_layer_norm")
        q, k, v = (
            linear(y, f"{layer}.self_attn.{name}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv"
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(norm(y, f"{layer}.self_attn.inner_attn_ln"), f"{layer}.self_attn.out_proj")
        y = F.gelu(linear(norm(x, f"{layer}.final_layer_norm"), f"{layer}.ffn.fc1"))
        x = x + linear(norm(y, f"{layer}.ffn.ffn_layernorm"), f"{layer}.ffn.fc2")
    x = norm(x, "encoder.layer_norm")
    expected = norm(x[:, 1:].mean(1), "norm", 1e-6) if case == "gigapath/mean" else norm(x, "norm", 1e-6)[:, 0]

    family = families.get("gigapath")
    ours = family.read_config(Published(config, {name: tuple(tensor.shape) for name, tensor in state.items()}))
    assert ours.mixer_options["dilated"] == longnet_block([64], [1])["mixer_options"]["dilated"]
    model = FarspanForImageClassification(ours).eval()
    model.load_state_dict(to_ours(state, family.entries(ours)))
    out = model(features=tiles, coordinates=places).logits
    assert_close(out, expected, rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)


def test_longvit_classifies_the_normed_mean_of_the_patches() -> None:
    model, _, state = published_checkpoint("longvit")
    out = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    mean = F.layer_norm(out.hidden_states[-1].mean(1), (32,), state["fc_norm.weight"], state["fc_norm.bias"])
    assert_close(out.logits, F.linear(mean, state["head.weight"], state["head.bias"]))
