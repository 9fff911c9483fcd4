"""A whole model under torch.compile: one graph forward, one backward, the same loss, gradients and cache."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.models.conftest import tiny
from tests.ops.checks import assert_close

STACKS = {
    "linear": ["softmax", "metala", "cosine", "ssd"],
    "keys": ["collinear", "dynamic_mask", "softmax"],
}
OPTIONS = {
    "dilated": {"segment_lengths": [4, 8], "dilations": [1, 2]},
    "dynamic_mask": {"keep_window_size": 4},
    "softmax": {"sliding_window": 5},
}
CACHED = {"linear": ["softmax", "metala", "cosine"], "keys": ["softmax", "dilated"]}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(mixers: list[str], **fields: Any) -> nn.Module:
    options = {name: OPTIONS[name] for name in mixers if name in OPTIONS and len(mixers) < 4}
    return tiny("softmax", mixers=mixers, mixer_options=options, num_hidden_layers=len(mixers), **fields)


def _inputs(padded: bool) -> dict[str, Tensor]:
    """Two rows of 20 tokens; padding on the left, in the middle and on the right."""
    ids = torch.randint(1, 61, (2, 20), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 7] = mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_training_step_is_one_graph(stack: str, padded: bool) -> None:
    model, inputs = _model(STACKS[stack]).train(), _inputs(padded)
    inputs |= {"labels": inputs["input_ids"]}
    want = model(**inputs)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    assert_close(got.loss, want.loss, tolerances.FLOAT32, "loss")
    assert_close(got.logits, want.logits, tolerances.FLOAT32, "logits")
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = (torch.autograd.grad(out.loss, parameters) for out in (got, want))
    for name, ours, theirs in zip(names, *grads, strict=True):
        assert_close(ours, theirs, tolerances.FLOAT32, name)


def test_a_training_step_on_packed_documents_is_one_graph() -> None:
    model, ids = _model(["softmax", "dilated", "metala"]).train(), _inputs(padded=False)["input_ids"][:1]
    inputs = {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 7, 7, 20], dtype=torch.int32)}
    losses = [run(**inputs).loss for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), model)]
    assert_close(*losses, tolerances.FLOAT32, "loss")
    grads = (torch.autograd.grad(loss, tuple(model.parameters())) for loss in losses)
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, tolerances.FLOAT32, "gradient")


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("stack", CACHED)
def test_a_prompt_is_one_graph_and_leaves_the_same_cache(stack: str, padded: bool) -> None:
    model, inputs, token = _model(CACHED[stack]), _inputs(padded), torch.tensor([[5], [6]])
    with torch.no_grad():
        want = model(**inputs)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
        assert_close(got.logits, want.logits, tolerances.FLOAT32, "logits")
        assert got.past_key_values.get_seq_length() == 20
        steps = [model(token, past_key_values=out.past_key_values).logits for out in (got, want)]
    assert_close(*steps, tolerances.FLOAT32, "next step")


@pytest.mark.parametrize("mixer", ["cosine", "metala", "softmax"])
def test_dynamo_counts_one_graph(mixer: str) -> None:
    inputs = _inputs(padded=True)
    explained = torch._dynamo.explain(_model([mixer]).train())(**inputs, labels=inputs["input_ids"])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_positions_and_padding_together_are_one_graph() -> None:
    model, inputs = _model(["softmax", "metala"]), _inputs(padded=True)
    inputs |= {"position_ids": torch.arange(20).unsqueeze(0)}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = (run(**inputs, use_cache=False).logits for run in (compiled, model))
    assert_close(ours, theirs, tolerances.FLOAT32, "logits")


def test_attention_weights_survive_compilation() -> None:
    model, inputs = _model(["softmax", "collinear"]), _inputs(padded=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = (run(**inputs, use_cache=False, output_attentions=True).attentions for run in (compiled, model))
    for layer, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(got, want, tolerances.FLOAT32, f"layer {layer}")


@pytest.mark.parametrize("mixer", ["cosine", "metala", "softmax", "ssd"])
def test_an_exported_model_computes_the_same(mixer: str) -> None:
    model, inputs = _model([mixer, mixer], use_cache=False), _inputs(padded=True)
    with torch.no_grad():
        exported = torch.export.export(model, args=(), kwargs=inputs, strict=False).module()
        assert_close(exported(**inputs).logits, model(**inputs).logits, tolerances.FLOAT32, "logits")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the code generator, on machines without its favourite tools
@pytest.mark.parametrize("mixer", ["cosine", "metala", "softmax"])
def test_generated_code_computes_the_same(mixer: str) -> None:
    model, inputs = _model([mixer, mixer]).train(), _inputs(padded=True)
    inputs |= {"labels": inputs["input_ids"]}
    want = model(**inputs).loss
    got = torch.compile(model, fullgraph=True)(**inputs).loss
    assert_close(got, want, tolerances.FLOAT32, "loss")
    grads = (torch.autograd.grad(loss, tuple(model.parameters())) for loss in (got, want))
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, tolerances.FLOAT32, "gradient")
