"""Masked language models and classifiers: losses against their formulas, over every mixer, padding and packing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from farspan import (
    FarspanConfig,
    FarspanForCausalLM,
    FarspanForMaskedLM,
    FarspanForSequenceClassification,
    FarspanForTokenClassification,
)
from farspan.errors import ConfigError, ShapeError
from farspan.mixers.base import MIXERS
from farspan.models.modeling import FarspanPreTrainedModel
from tests import tolerances
from tests.models.conftest import MIXES

HEADS = (FarspanForMaskedLM, FarspanForSequenceClassification, FarspanForTokenClassification)
BERT = {"pooler": True, "next_sentence_head": True, "lm_head_bias": True, "tie_word_embeddings": True}


def tiny(head: type[FarspanPreTrainedModel], mix: str = "hybrid", **overrides: Any) -> FarspanPreTrainedModel:
    """A model in evaluation mode with every zero-initialised parameter perturbed."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "initializer_range": 0.3,
        "num_labels": 3,
        "classifier_bias": True,
    }
    model = head(FarspanConfig(**{**fields, **MIXES[mix], **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return model


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(4))


def labels_for(head: type, tokens: Tensor) -> Tensor:
    if head is FarspanForSequenceClassification:
        return torch.arange(len(tokens)) % 3
    labels = tokens.clone() if head is FarspanForMaskedLM else tokens % 3
    return labels.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.6, -100)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("causal", [True, False])
def test_every_mixer(head: type[FarspanPreTrainedModel], mix: str, causal: bool) -> None:
    names = MIXES[mix]["mixers"]
    if not causal and not all(MIXERS.get(name)[0].bidirectional for name in names):
        pytest.skip(f"{mix} looks back only")
    model = tiny(head, mix, causal=causal)
    tokens = ids(2, 11)
    out = model(tokens, labels=labels_for(head, tokens))
    reached = gradients(model, out.loss)
    assert all(x.isfinite().all() for x in reached.values())
    assert {name for name, _ in model.named_parameters()} == reached.keys()
    with torch.no_grad():
        changed = tokens.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 60 + 1
        before, after = model(tokens).logits, model(changed).logits
    if head is not FarspanForSequenceClassification:
        bound = tolerances.FLOAT32 * before.abs().max()
        assert bool(((before - after)[:, :5].abs() < bound).all()) == causal


def test_masked_lm_is_cross_entropy_of_the_transformed_states() -> None:
    model = tiny(FarspanForMaskedLM, causal=False, mixers=["cosine", "softmax", "cosine"], **BERT).double()
    tokens = ids(3, 9)
    labels, relation = labels_for(FarspanForMaskedLM, tokens), torch.tensor([0, 1, 1])
    stack = model.model(tokens)
    hidden = model.transform.norm(nn.functional.silu(model.transform.dense(stack.last_hidden_state)))
    logits = hidden @ model.model.embed_tokens.weight.T + model.lm_head.bias
    mlm = cross_entropy(logits.flatten(0, 1), labels.flatten())
    pooled = (stack.last_hidden_state[:, 0] @ model.model.pooler.weight.T + model.model.pooler.bias).tanh()
    nsp = cross_entropy(pooled @ model.next_sentence_head.weight.T + model.next_sentence_head.bias, relation)
    want = gradients(model, mlm + nsp)
    out = model(tokens, labels=labels, next_sentence_label=relation)
    assert_close(out.logits, logits)
    assert_close(out.mlm_loss, mlm)
    assert_close(out.nsp_loss, nsp)
    for chunked in (False, True):
        again = model(tokens, labels=labels, next_sentence_label=relation, output_logits=not chunked)
        assert (again.logits is None) == chunked
        assert_close(again.loss, mlm + nsp)
        ours = gradients(model, again.loss)
        assert ours.keys() == want.keys()
        for name, x in want.items():
            assert_close(ours[name], x)
    assert model(tokens, next_sentence_label=relation).loss == out.nsp_loss
    assert model(tokens).loss is None


@pytest.mark.parametrize("head", HEADS)
def test_micro_batches_add_up(head: type[FarspanPreTrainedModel]) -> None:
    model = tiny(head)
    tokens = ids(4, 9)
    labels = labels_for(head, tokens)
    scored = (labels != -100).sum()
    whole = model(tokens, labels=labels).loss
    parts = [
        model(tokens[rows], labels=labels[rows], num_items_in_batch=scored).loss for rows in (slice(1), slice(1, 4))
    ]
    assert_close(sum(parts), whole)


def test_no_scored_label_costs_nothing() -> None:
    for head in (FarspanForMaskedLM, FarspanForTokenClassification):
        model, tokens = tiny(head), ids(2, 5)
        loss = model(tokens, labels=torch.full_like(tokens, -100)).loss
        assert loss == 0
        assert all((x == 0).all() for x in gradients(model, loss).values())


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (3, torch.tensor([2, 0, 1]), "single_label_classification"),
        (3, torch.tensor([2, -100, 1]), "single_label_classification"),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), "multi_label_classification"),
        (1, torch.tensor([0.5, -2.0, 3.0]), "regression"),
        (1, torch.tensor([[0.5], [-2.0], [3.0]]), "regression"),
        (1, torch.tensor([1, 5, 3]), "regression"),
    ],
)
def test_problem_types_are_those_of_transformers(num_labels: int, labels: Tensor, problem: str) -> None:
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    model = tiny(FarspanForSequenceClassification, num_labels=num_labels)
    config = FarspanConfig(num_labels=num_labels, num_hidden_layers=1)
    out = model(ids(3, 6), labels=labels)
    targets = labels.float() if problem != "single_label_classification" else labels
    assert_close(out.loss, ForSequenceClassificationLoss(targets, out.logits, config))
    assert model.config.problem_type == problem == config.problem_type
    # Explicitly named, it is what the loss does; several numbers can be learnt as well.
    model.config.problem_type = "regression"
    numbers = torch.randn(3, num_labels)
    assert_close(model(ids(3, 6), labels=numbers).loss, (out.logits - numbers).square().mean())


@pytest.mark.parametrize(
    ("fields", "labels", "words"),
    [
        ({}, torch.zeros(3, 1, dtype=torch.long), r"shape \[3, 1\]; single_label_classification expects \[3\]"),
        ({}, torch.tensor([0, 3, 1]), "labels hold 3; accepted are classes 0 to 2"),
        ({}, torch.zeros(3, 2), r"shape \[3, 2\]; multi_label_classification expects \[3, 3\]"),
        ({"num_labels": 1}, torch.zeros(3, 3), r"shape \[3, 3\]; regression expects \[3, 1\]"),
    ],
)
def test_labels_of_another_form_are_refused(fields: dict, labels: Tensor, words: str) -> None:
    model = tiny(FarspanForSequenceClassification, **fields)
    with pytest.raises(ShapeError, match=words):
        model(ids(3, 6), labels=labels)
    assert model.config.problem_type is None  # what does not fit decides nothing


def test_tokens_have_classes_whatever_else_is_learnt() -> None:
    model, tokens = tiny(FarspanForTokenClassification, problem_type="regression"), ids(2, 6)
    out = model(tokens, labels=tokens % 3)
    assert_close(out.loss, cross_entropy(out.logits.flatten(0, 1), (tokens % 3).flatten()))
    assert model.config.problem_type == "regression"


def test_without_classes_nothing_is_learnt() -> None:
    model = tiny(FarspanForSequenceClassification, num_labels=0)
    assert model(ids(3, 6)).logits.shape == (3, 32)
    with pytest.raises(ConfigError, match="num_labels=0 has no classes"):
        model(ids(3, 6), labels=torch.zeros(3, dtype=torch.long))


def test_labels_of_tokens_are_checked() -> None:
    for head in (FarspanForMaskedLM, FarspanForTokenClassification):
        with pytest.raises(ShapeError, match=r"labels have shape \[2, 5\]"):
            tiny(head)(ids(2, 6), labels=torch.zeros(2, 5, dtype=torch.long))


POOLINGS: dict[str, Callable[[FarspanPreTrainedModel, Tensor], Tensor]] = {
    "first": lambda model, x: x[:, 0],
    "last": lambda model, x: x[:, -1],
    "mean": lambda model, x: x.mean(1),
    "pooler": lambda model, x: model.model.pooler(x[:, 0]).tanh(),
}


@pytest.mark.parametrize("how", sorted(POOLINGS))
@pytest.mark.parametrize("causal", [True, False])
def test_pooling_reads_real_tokens_wherever_padding_stands(how: str, causal: bool) -> None:
    mixers = ["cosine", "softmax", "metala"]
    fields = {"classifier_pooling": how, "pooler": how == "pooler", "causal": causal, "mixers": mixers}
    model = tiny(FarspanForSequenceClassification, **fields)
    texts = [ids(1, length)[0] for length in (7, 3, 5)]
    with torch.no_grad():
        alone = []
        for text in texts:
            hidden = model.model(text[None], use_cache=False).last_hidden_state
            alone.append(model.classifier(POOLINGS[how](model, hidden)))
        want = torch.cat(alone)
        for places in (lambda n: range(n), lambda n: range(9 - n, 9), lambda n: [i + (i > 1) for i in range(n)]):
            batch, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
            for row, text in enumerate(texts):
                at = list(places(len(text)))
                batch[row, at], mask[row, at] = text, 1
            assert_close(model(batch, attention_mask=mask).logits, want, atol=tolerances.FLOAT32, rtol=0)
        packed = torch.cat(texts)[None]
        bounds = torch.tensor([0, 7, 10, 15], dtype=torch.int32)
        positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
        for given in ({"cu_seqlens": bounds}, {"position_ids": positions}):
            assert_close(model(packed, **given).logits, want, atol=tolerances.FLOAT32, rtol=0)
        mask[1] = 0
        assert model(batch, attention_mask=mask).logits.isfinite().all()


def test_a_text_without_tokens_pools_to_zero() -> None:
    tokens, bounds = ids(1, 5), torch.tensor([0, 0, 5, 5], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    for how in ("first", "last", "mean"):
        model = tiny(FarspanForSequenceClassification, "cosine", classifier_pooling=how)
        packed = model(tokens, cu_seqlens=bounds).logits
        assert torch.equal(packed[0], model.classifier.bias) and torch.equal(packed[2], model.classifier.bias)
        padded = model(tokens.expand(2, -1), attention_mask=mask).logits
        assert_close(padded, packed[[1, 0]], atol=tolerances.FLOAT32, rtol=0)
        assert torch.equal(model(tokens[:, :0]).logits, packed[:1])


def test_packed_documents_have_a_next_sentence_each() -> None:
    model = tiny(FarspanForMaskedLM, "cosine", causal=False, **BERT)
    first, second = ids(1, 4), ids(1, 6)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    with torch.no_grad():
        packed = model(torch.cat((first, second), 1), cu_seqlens=bounds)
        alone = [model(text).seq_relationship_logits for text in (first, second)]
    assert_close(packed.seq_relationship_logits, torch.cat(alone), atol=tolerances.FLOAT32, rtol=0)


@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing_changes_nothing(head: type[FarspanPreTrainedModel]) -> None:
    model, tokens = tiny(head), ids(2, 9)
    labels = labels_for(head, tokens)
    model.train()
    want = gradients(model, model(tokens, labels=labels).loss)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    got = gradients(model, model(tokens, labels=labels).loss)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert_close(got[name], x)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_experts_is_part_of_the_loss(head: type[FarspanPreTrainedModel]) -> None:
    options = {"cdmoe": {"num_experts": 16, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.1}}
    fields = {"feed_forwards": ["cdmoe"], "feed_forward_options": options, "num_labels": 3}
    model, tokens = tiny(head, **fields).train(), ids(2, 9)
    labels = labels_for(head, tokens)
    out = model(tokens, labels=labels)
    assert out.aux_loss > 0 and len(out.auxiliary) == 3
    scored = (labels != -100).sum()
    parts = [model(tokens, labels=labels, num_items_in_batch=2 * scored).loss for _ in range(2)]
    assert_close(sum(parts), out.loss)
    if head is FarspanForMaskedLM:
        task = out.mlm_loss
    else:
        task = cross_entropy(out.logits.reshape(-1, 3), labels.reshape(-1))
    assert_close(out.loss, task + out.aux_loss)


def test_resizing_the_vocabulary_keeps_tie_and_bias() -> None:
    model, tokens = tiny(FarspanForMaskedLM, **BERT), ids(2, 5)
    before = model(tokens).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.bias.shape == (70,) and model.config.vocab_size == 70
    assert_close(model(tokens).logits[..., :61], before)
    assert model(tokens, labels=torch.full_like(tokens, 69)).loss.isfinite()


@pytest.mark.parametrize("head", HEADS)
def test_arguments(head: type[FarspanPreTrainedModel]) -> None:
    model, tokens = tiny(head), ids(2, 5)
    want = model(tokens).logits
    given = model(tokens, special_tokens_mask=torch.zeros_like(tokens), token_type_ids=torch.zeros_like(tokens))
    assert torch.equal(given.logits, want)
    assert torch.equal(model(tokens, return_dict=False)[0], want)
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), output_hidden_states=True)
    assert torch.equal(embedded.logits, want) and len(embedded.hidden_states) == 4
    with pytest.raises(ConfigError, match="did you mean 'attention_mask'"):
        model(tokens, attention_masks=torch.ones_like(tokens))


def test_what_a_head_needs_is_said() -> None:
    with pytest.raises(ConfigError, match="next_sentence_head=true"):
        tiny(FarspanForMaskedLM)(ids(2, 5), next_sentence_label=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="needs a vocabulary"):
        tiny(FarspanForMaskedLM, vocab_size=0)


def test_vectors_can_be_classified() -> None:
    model = tiny(FarspanForSequenceClassification, vocab_size=0)
    assert model(inputs_embeds=torch.randn(2, 6, 32)).logits.shape == (2, 3)


def test_dropout_stands_before_the_classifier() -> None:
    model = tiny(FarspanForTokenClassification, classifier_dropout=0.5)
    tokens = ids(2, 9)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert not torch.equal(model.train()(tokens).logits, model(tokens).logits)


def test_attention_dropout_acts_in_training_alone() -> None:
    options = {"mixers": ["softmax"], "mixer_options": {"softmax": {"attention_dropout": 0.5}}}
    model = tiny(FarspanForTokenClassification, **options)
    plain = tiny(FarspanForTokenClassification, mixers=["softmax"])
    tokens = ids(2, 9)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert not torch.equal(model.train()(tokens).logits, plain(tokens).logits)
    with pytest.raises(ConfigError, match=r"attention_dropout=1\.0 must lie in"):
        FarspanConfig(mixers=["softmax"], mixer_options={"softmax": {"attention_dropout": 1.0}})


def test_a_causal_model_lends_its_stack(tmp_path: Any) -> None:
    source = tiny(FarspanForCausalLM)
    source.save_pretrained(tmp_path)
    for head, new in (
        (FarspanForSequenceClassification, {"classifier.weight", "classifier.bias"}),
        (FarspanForTokenClassification, {"classifier.weight", "classifier.bias"}),
        (FarspanForMaskedLM, {f"transform.{name}" for name in ("dense.weight", "dense.bias", "norm.weight")}),
    ):
        model, report = head.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] == new and not report["mismatched_keys"]
        for name, x in source.model.state_dict().items():
            assert torch.equal(model.model.state_dict()[name], x)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_one_graph(head: type[FarspanPreTrainedModel]) -> None:
    model, tokens = tiny(head, mixers=["cosine", "ssd", "cosine"], causal=False), ids(2, 9)
    labels, mask = labels_for(head, tokens), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0

    def loss(tokens: Tensor) -> Tensor:
        return model(tokens, attention_mask=mask, labels=labels).loss

    want = loss(tokens)
    torch._dynamo.reset()
    assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(tokens), want)
