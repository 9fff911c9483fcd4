"""The block description: every way to join mixer and feed-forward to the residual stream, against its formula."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close as close

from farspan import FarspanConfig, FarspanModel
from farspan.errors import ConfigError, ShapeError
from farspan.mixers.layout import SequenceLayout
from farspan.models.blocks import DropPath, FarspanBlock
from tests.models.conftest import tiny

SHAPE = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4}
LAYOUT = SequenceLayout(torch.arange(7).expand(2, -1))


def block(**fields: object) -> tuple[FarspanBlock, Tensor]:
    """The second of four layers, every parameter at random, and an input `[2, 7, 16]`."""
    torch.manual_seed(0)
    made = FarspanBlock(FarspanConfig(**SHAPE, **fields), 1).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made, torch.randn(2, 7, 16, dtype=torch.float64)


def branches(made: FarspanBlock) -> tuple[nn.Module, nn.Module]:
    """The mixer and the feed-forward as plain functions of x."""
    return (lambda x: made.mixer(x, layout=LAYOUT)), (lambda x: made.feed_forward(x)[0])


@pytest.mark.parametrize("scaling", ["none", "per_channel", "deepnorm"])
def test_pre_norm(scaling: str) -> None:
    made, x = block(residual_scaling=scaling)
    mixer, feed_forward = branches(made)
    alpha = 8**0.25 if scaling == "deepnorm" else 1
    a, b = (made.mixer_residual, made.feed_forward_residual) if scaling == "per_channel" else (alpha, alpha)
    middle = a * x + mixer(made.mixer_norm(x))
    close(made(x, layout=LAYOUT)[0], b * middle + feed_forward(made.feed_forward_norm(middle)))


@pytest.mark.parametrize("scaling", ["none", "per_channel", "deepnorm"])
def test_post_norm(scaling: str) -> None:
    made, x = block(norm_place="post", norm_type="layer_norm", residual_scaling=scaling)
    mixer, feed_forward = branches(made)
    per_channel = scaling == "per_channel"
    alpha = 8**0.25 if scaling == "deepnorm" else 1  # (2 · 4 layers)^¼
    a, b = (made.mixer_residual, made.feed_forward_residual) if per_channel else (alpha, alpha)
    middle = made.mixer_norm(a * x + mixer(x))
    close(made(x, layout=LAYOUT)[0], made.feed_forward_norm(b * middle + feed_forward(middle)))


@pytest.mark.parametrize("shared", [False, True])
def test_parallel(shared: bool) -> None:
    made, x = block(use_parallel_residual=True, shared_parallel_norm=shared, norm_type="layer_norm")
    mixer, feed_forward = branches(made)
    norm = made.mixer_norm if shared else made.feed_forward_norm
    close(made(x, layout=LAYOUT)[0], x + mixer(made.mixer_norm(x)) + feed_forward(norm(x)))
    assert (made.feed_forward_norm is None) == shared


def test_sub_norm_stands_inside_both_branches() -> None:
    made, x = block(norm_place="sub", feed_forwards=["mlp"], norm_type="layer_norm")
    inner = made.feed_forward
    hidden = nn.functional.layer_norm(
        inner.activation(inner.up_proj(x)), (24,), inner.sub_norm.weight, inner.sub_norm.bias, inner.sub_norm.eps
    )
    close(inner(x)[0], inner.down_proj(hidden))
    assert isinstance(made.mixer.sub_norm, nn.LayerNorm)
    mixer, feed_forward = branches(made)
    middle = x + mixer(made.mixer_norm(x))
    close(made(x, layout=LAYOUT)[0], middle + feed_forward(made.feed_forward_norm(middle)))


def test_sub_norm_is_refused_where_a_branch_has_none() -> None:
    with pytest.raises(ConfigError, match="'metala' has none"):
        FarspanConfig(**SHAPE, mixers=["metala"], norm_place="sub")


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1.0),
        ({"norm_place": "sub"}, math.sqrt(math.log(8))),
        ({"norm_place": "post", "residual_scaling": "deepnorm"}, 32**-0.25),
    ],
)
def test_initial_size_of_the_branches(fields: dict, scale: float) -> None:
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": 128, "intermediate_size": 256}
    layer = FarspanModel(FarspanConfig(**shape, **fields)).blocks[2]
    for projection in (
        layer.mixer.v_proj,
        layer.mixer.o_proj,
        layer.feed_forward.down_proj,
        layer.feed_forward.up_proj,
    ):
        assert projection.weight.std().item() == pytest.approx(0.02 * scale, rel=0.03)
    assert layer.mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_drop_path_keeps_the_mean_and_drops_whole_rows() -> None:
    torch.manual_seed(0)
    path = DropPath(0.25)
    y = path(torch.ones(4000, 3, 2))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == y[:, :1, :1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert path.eval()(y) is y


def test_drop_path_grows_with_depth() -> None:
    model = FarspanModel(FarspanConfig(**SHAPE, drop_path_rate=0.3))
    assert [layer.drop_path.rate for layer in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_final_norm_follows_the_place_of_the_norms() -> None:
    assert isinstance(FarspanModel(FarspanConfig(**SHAPE, norm_place="post")).norm, nn.Identity)
    assert not isinstance(FarspanModel(FarspanConfig(**SHAPE)).norm, nn.Identity)
    assert not isinstance(FarspanModel(FarspanConfig(**SHAPE, norm_place="post", final_norm=True)).norm, nn.Identity)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shared_parallel_norm": True}, "needs use_parallel_residual"),
        ({"use_parallel_residual": True, "norm_place": "post"}, "needs norm_place='pre'"),
        ({"use_parallel_residual": True, "residual_scaling": "per_channel"}, "needs norm_place='pre'"),
        ({"residual_scaling": "deepnorm", "norm_place": "sub"}, "choose norm_place='post'"),
        ({"next_sentence_head": True}, "set pooler=true"),
        ({"classifier_pooling": "pooler"}, "needs pooler=true"),
        ({"norm_place": "middle"}, "norm_place='middle'"),
        ({"drop_path_rate": 1.0}, r"must lie in \[0, 1\)"),
        ({"type_vocab_size": -1}, "must not be negative"),
        ({"vocab_size": 0, "tie_word_embeddings": True}, "needs token embeddings"),
    ],
)
def test_senseless_descriptions_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FarspanConfig(**{**SHAPE, **fields})


def embedded(**fields: object) -> FarspanModel:
    torch.manual_seed(0)
    return FarspanModel(FarspanConfig(**{**SHAPE, "max_position_embeddings": 9, **fields})).eval()


def test_embeddings_are_the_sum_of_what_the_config_names() -> None:
    model = embedded(
        embedding_scale=4.0,
        type_vocab_size=2,
        position_embedding="learned",
        position_embedding_offset=2,
        embedding_norm=True,
        norm_type="layer_norm",
    )
    ids, types = torch.randint(31, (2, 7)), torch.randint(2, (2, 7))
    first = model(ids, token_type_ids=types, output_hidden_states=True).hidden_states[0]
    rows = model.embed_positions.weight[2:9]
    expected = model.embed_norm(4 * model.embed_tokens(ids) + model.embed_token_types(types) + rows)
    close(first, expected)
    assert model.embed_positions.weight.shape == (11, 16)
    untyped = model(ids, output_hidden_states=True).hidden_states[0]
    close(untyped, model(ids, token_type_ids=torch.zeros_like(ids), output_hidden_states=True).hidden_states[0])


def test_learned_positions_count_real_tokens_and_continue_behind_the_cache() -> None:
    model = embedded(position_embedding="learned", mixers=["softmax"], mixer_options={"softmax": {"rope": False}})
    ids = torch.randint(31, (1, 6))
    whole = model(ids).last_hidden_state
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    close(model(padded, attention_mask=mask).last_hidden_state[:, 2:], whole)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    close(model(ids[:, 4:], past_key_values=cache).last_hidden_state, whole[:, 4:])


def test_positions_beyond_the_table_are_refused() -> None:
    model = embedded(position_embedding="learned")
    with pytest.raises(ShapeError, match="Position 9 is beyond the 9 learned positions"):
        model(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(ShapeError, match="Position 20"):
        model(torch.zeros(1, 2, dtype=torch.long), position_ids=torch.tensor([[3, 20]]))
    padded = torch.ones(1, 12, dtype=torch.long)
    padded[0, :4] = 0
    assert model(torch.zeros(1, 12, dtype=torch.long), attention_mask=padded).last_hidden_state.isfinite().all()


def test_pooler_reads_the_first_real_token() -> None:
    model = embedded(pooler=True, causal=False)
    ids = torch.randint(31, (1, 5))
    pooled = model(ids).pooler_output
    close(pooled, model.pooler(model(ids).last_hidden_state[:, 0]).tanh())
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    close(model(padded, attention_mask=mask).pooler_output, pooled)


def test_a_stack_without_vocabulary_takes_embeddings() -> None:
    model = embedded(vocab_size=0)
    assert model.embed_tokens is None
    assert model(inputs_embeds=torch.randn(2, 5, 16)).last_hidden_state.shape == (2, 5, 16)
    with pytest.raises(ConfigError, match="vocab_size=0"):
        model(torch.zeros(1, 2, dtype=torch.long))


def test_token_types_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match="token_type_ids has shape"):
        embedded(type_vocab_size=2)(torch.zeros(2, 5, dtype=torch.long), token_type_ids=torch.zeros(2, 4).long())


def test_head_bias_takes_part_in_logits_and_loss() -> None:
    model = tiny("softmax", lm_head_bias=True)
    ids = torch.randint(61, (2, 6))
    out = model(ids, labels=ids)
    logits = out.logits[:, :-1].flatten(0, 1)
    close(out.loss, nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
    with torch.no_grad():
        model.lm_head.bias.add_(3)
    close(model(ids).logits, out.logits + 3)
