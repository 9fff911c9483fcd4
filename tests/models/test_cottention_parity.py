"""Stock BERT and GPT-J of transformers against our models with their parameters; what the cosine variants change."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTJModel,
    PreTrainedModel,
)

import farspan.models
from farspan.errors import CheckpointError
from farspan.models.convert.families import Published, detect
from farspan.models.convert.names import to_ours, to_published
from farspan.models.modeling import FarspanPreTrainedModel

BERT = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 24,
    "num_labels": 5,
    "initializer_range": 0.3,
}
GPTJ = {
    "vocab_size": 53,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 24,
    "rotary_dim": 6,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
STOCK: dict[str, Callable[[], PreTrainedModel]] = {
    "pre-training": lambda: BertForPreTraining(BertConfig(**BERT)),
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT, hidden_act="gelu_new")),
    "sequence": lambda: BertForSequenceClassification(BertConfig(**BERT, problem_type="multi_label_classification")),
    "tokens": lambda: BertForTokenClassification(BertConfig(**BERT, hidden_act="relu", classifier_dropout=0.3)),
    "bert stack": lambda: BertModel(BertConfig(**BERT, layer_norm_eps=1e-3, type_vocab_size=3)),
    "language model": lambda: GPTJForCausalLM(GPTJConfig(**GPTJ)),
    "tied": lambda: GPTJForCausalLM(GPTJConfig(**GPTJ, tie_word_embeddings=True, n_inner=40)),
    "gpt stack": lambda: GPTJModel(GPTJConfig(**GPTJ, activation_function="gelu")),
}
ARCHITECTURES = {
    "pre-training": "FarspanForMaskedLM",
    "masked": "FarspanForMaskedLM",
    "sequence": "FarspanForSequenceClassification",
    "tokens": "FarspanForTokenClassification",
    "bert stack": "FarspanModel",
    "language model": "FarspanForCausalLM",
    "tied": "FarspanForCausalLM",
    "gpt stack": "FarspanModel",
}


def stock(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = STOCK[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=1.0 if parameter.any() else 0.0, std=0.3)
    return model


def published(model: PreTrainedModel, **changes: Any) -> Published:
    config = model.config.to_dict() | {"architectures": [type(model).__name__]} | changes
    return Published(config, {name: tuple(x.shape) for name, x in model.state_dict().items()})


def converted(state: Mapping[str, Tensor], source: Published) -> FarspanPreTrainedModel:
    family = detect(source)
    config = family.read_config(source)
    assert config.architectures is not None
    model = getattr(farspan.models, config.architectures[0])(config).eval()
    ours = to_ours(state, family.entries(config))
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected and set(missing) <= set(model.all_tied_weights_keys)
    return model


@pytest.mark.parametrize("name", sorted(STOCK))
def test_equals_transformers(name: str) -> None:
    theirs = stock(name)
    source = published(theirs)
    ours = converted(theirs.state_dict(), source)
    assert type(ours).__name__ == ARCHITECTURES[name]
    assert detect(source).name == ("gptj" if isinstance(theirs.config, GPTJConfig) else "bert")
    ids, mask = torch.randint(0, 53, (3, 17)), torch.ones(3, 17, dtype=torch.long)
    mask[0, 11:] = mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if source.config["model_type"] == "bert":
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape)
    with torch.no_grad():
        out, want = ours(**inputs), theirs(**inputs)
    compared = 0
    for ours_name, theirs_name in (
        ("logits", "logits"),
        ("logits", "prediction_logits"),
        ("seq_relationship_logits", "seq_relationship_logits"),
        ("last_hidden_state", "last_hidden_state"),
        ("pooler_output", "pooler_output"),
    ):
        if theirs_name in want:
            ours_out, theirs_out = out[ours_name], want[theirs_name]
            if theirs_out.shape[:2] == ids.shape:
                ours_out, theirs_out = ours_out[mask.bool()], theirs_out[mask.bool()]
            assert_close(ours_out, theirs_out, atol=2e-5, rtol=1e-4)
            compared += 1
    assert compared == (2 if name in ("pre-training", "bert stack") else 1)
    assert ("pooler_output" in want) == (out.get("pooler_output") is not None)


@pytest.mark.parametrize("name", sorted(STOCK))
def test_round_trip(name: str) -> None:
    theirs = stock(name)
    source = published(theirs)
    family, state = detect(source), theirs.state_dict()
    config = family.read_config(source)
    entries = family.entries(config)
    back = to_published(to_ours(state, entries), entries)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    written = family.write_config(config)
    again = Published(written, {key: tuple(x.shape) for key, x in back.items()})
    assert detect(again) is family
    assert family.read_config(again) == config
    for key, value in written.items():
        if key in source.config and key != "n_inner":  # null in the source
            assert source.config[key] in (value, None), key


def test_old_names_of_norms() -> None:
    """The released bert-base files say gamma and beta."""
    theirs = stock("pre-training")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in theirs.state_dict().items()
    }
    assert old.keys() != theirs.state_dict().keys()
    source = Published(theirs.config.to_dict(), {name: tuple(x.shape) for name, x in old.items()})
    tokens = torch.randint(0, 53, (2, 7))
    with torch.no_grad():
        assert_close(converted(old, source)(tokens).logits, theirs(tokens).prediction_logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_greedy_text_of_gptj(left: bool) -> None:
    """GPT-J's generate shifts positions for left padding as ours does."""
    theirs = stock("language model")
    ours = converted(theirs.state_dict(), published(theirs))
    ids, mask = torch.randint(2, 53, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    if left:
        mask[0, :4] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    want = theirs.generate(ids, **arguments)
    assert torch.equal(ours.generate(ids, **arguments), want)
    assert want.shape[1] > 10


def cosine(name: str) -> tuple[dict[str, Tensor], Published]:
    """A stock model to which exponents were added, as the released checkpoints are."""
    model = stock(name)
    state = dict(model.state_dict())
    bert = isinstance(model.config, BertConfig)
    place = "bert.encoder.layer.{}.attention.self" if bert else "transformer.h.{}.attn"
    for i in range(3):
        state[f"{place.format(i)}.norm_const"] = torch.randn(1, 4, 1, 1)
    return state, Published(published(model).config, {key: tuple(x.shape) for key, x in state.items()})


@pytest.mark.parametrize(
    ("name", "family"), [("pre-training", "cottention-bert"), ("language model", "cottention-gpt")]
)
def test_cosine_is_known_by_its_exponents(name: str, family: str) -> None:
    state, source = cosine(name)
    found = detect(source)
    assert found.name == family
    assert found.traps is not None and "norm_const" in found.traps
    model = converted(state, source)
    assert set(model.config.mixers) == {"cosine"}
    exponents = [block.mixer.length_exponent for block in model.model.blocks]
    assert all(
        torch.equal(exponents[i], x.flatten()) for i, x in enumerate(v for k, v in state.items() if "norm_" in k)
    )
    entries = found.entries(model.config)
    back = to_published(to_ours(state, entries), entries)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    again = Published(found.write_config(model.config), source.shapes)
    assert found.read_config(again) == model.config


@pytest.mark.parametrize("name", ["pre-training", "language model"])
def test_lost_exponents_are_refused(name: str) -> None:
    state, source = cosine(name)
    lost = next(key for key in state if ".1." in key and key.endswith("norm_const"))
    partial = Published(source.config, {key: shape for key, shape in source.shapes.items() if key != lost})
    with pytest.raises(CheckpointError, match=f"1 of 3 are missing, the first is {lost}"):
        detect(partial).read_config(partial)
    none = {key: shape for key, shape in source.shapes.items() if "norm_const" not in key}
    claims = Published({**source.config, "attention_type": "cos"}, none)
    with pytest.raises(CheckpointError, match="lost them"):
        detect(claims).read_config(claims)
    contradicts = Published({**source.config, "attention_type": "soft"}, source.shapes)
    with pytest.raises(CheckpointError, match="set it to 'cos'"):
        detect(contradicts).read_config(contradicts)
    family = detect(source)
    with pytest.raises(CheckpointError, match="missing"):
        to_ours({key: x for key, x in state.items() if key != lost}, family.entries(family.read_config(source)))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("masked", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("masked", {"is_decoder": True}, "is_decoder=True"),
        ("masked", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("masked", {"hidden_act": "mish"}, "'mish' is not known"),
        ("masked", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("sequence", {"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
        ("language model", {"rotary_dim": None}, "rotary_dim=null"),
        ("language model", {"activation_function": "quick_gelu"}, "'quick_gelu' is not known"),
    ],
)
def test_settings_that_change_the_result_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    source = published(stock(name), **changes)
    with pytest.raises(CheckpointError, match=words):
        detect(source).read_config(source)


def test_another_model_type_with_the_same_names_is_refused() -> None:
    source = published(stock("bert stack"), model_type="roberta")
    with pytest.raises(CheckpointError, match="No known family"):
        detect(source)


def test_the_rotated_channels_survive_the_share() -> None:
    """6 of 47 channels is a share whose product with 47 lies below 6 in floating point."""
    model = GPTJForCausalLM(GPTJConfig(**{**GPTJ, "n_embd": 94, "n_head": 2}))
    source = published(model)
    for state in (
        model.state_dict(),
        model.state_dict() | {"transformer.h.0.attn.norm_const": torch.zeros(1, 2, 1, 1)},
    ):
        if "transformer.h.0.attn.norm_const" in state:
            state |= {f"transformer.h.{i}.attn.norm_const": torch.zeros(1, 2, 1, 1) for i in (1, 2)}
        ours = converted(state, Published(source.config, {key: tuple(x.shape) for key, x in state.items()}))
        assert [block.mixer.rotary_dim for block in ours.model.blocks] == [6, 6, 6]
        assert detect(source).write_config(ours.config)["rotary_dim"] == 6
