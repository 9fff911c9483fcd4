"""The forward contract of transformers, and what is ours in it: packing, padding anywhere, the chunked loss."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from farspan.errors import ConfigError, ShapeError
from tests.models.conftest import MIXES, tiny


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(4))


def test_future_does_not_change_past(mix: str) -> None:
    model, ids = tiny(mix), _ids(1, 20)
    other = ids.clone()
    other[0, 12:] = 3
    model.double()  # a chunk's decay reference lies in its middle, so the future may move the past by rounding alone
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :12], model(other).logits[:, :12], atol=1e-12, rtol=0)


def test_packed_documents_equal_separate_ones(mix: str) -> None:
    model, ids = tiny(mix), _ids(1, 23)
    bounds = torch.tensor([0, 5, 5, 17, 23], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (5, 12, 6)]).unsqueeze(0)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=bounds).logits
        separate = torch.cat([model(ids[:, a:b]).logits for a, b in ((0, 5), (5, 17), (17, 23))], dim=1)
        by_positions = model(ids, position_ids=positions).logits
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_positions, packed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask_row", ["0000011111", "1111100000", "0011011101", "1111111111"])
def test_padding_at_any_place_changes_nothing(mix: str, mask_row: str) -> None:
    model, ids = tiny(mix), _ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1] = torch.tensor([int(c) for c in mask_row])
    real = mask[1].bool()
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        cached = model(ids, attention_mask=mask, use_cache=True).logits
        alone = model(ids[1:, real]).logits
    torch.testing.assert_close(padded[1:, real], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cached[1:, real], alone, atol=1e-5, rtol=1e-4)
    assert padded.isfinite().all()


def test_a_row_of_padding_alone_is_finite(mix: str) -> None:
    model, ids = tiny(mix), _ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0] = 0
    with torch.no_grad():
        cache = model.new_cache()
        assert model(ids, attention_mask=mask, past_key_values=cache).logits.isfinite().all()
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()


def test_batch_permutation(mix: str) -> None:
    model, ids = tiny(mix).double(), _ids(3, 11)  # a matrix product may round a row by its place
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        torch.testing.assert_close(model(ids[order]).logits, model(ids).logits[order], atol=1e-12, rtol=0)


def test_labels_are_shifted_inside(mix: str) -> None:
    model, ids = tiny(mix), _ids(2, 10)
    labels = ids.clone()
    labels[0, :3] = -100
    out = model(ids, labels=labels)
    expected = cross_entropy(out.logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    aligned = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    chunked = model(ids, shift_labels=aligned, output_logits=False)
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, expected)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, expected * 16 / 7)


def test_every_parameter_has_a_gradient(mix: str) -> None:
    model = tiny(mix).train()
    model(_ids(2, 12), labels=_ids(2, 12)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing(mix: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny(mix).train()
        if checkpointing:
            # transformers renames this method between the versions we support
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(_ids(2, 12), labels=_ids(2, 12)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_dynamic_rope_plans_for_the_longest_document_not_for_the_packed_row() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0}
    model, ids = tiny("softmax", max_position_embeddings=12, rope_parameters=rope), _ids(1, 24)
    bounds = torch.tensor([0, 12, 24], dtype=torch.int32)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=bounds).logits
        separate = torch.cat([model(half).logits for half in ids.split(12, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)


def test_embeddings_hidden_states_and_kept_logits(mix: str) -> None:
    model, ids = tiny(mix), _ids(2, 9)
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
        last = model(ids, logits_to_keep=2).logits
        picked = model(ids, logits_to_keep=torch.tensor([1, 4])).logits
        as_tuple = model(ids, return_dict=False, use_cache=False)
    torch.testing.assert_close(embedded.logits, plain.logits)
    torch.testing.assert_close(last, plain.logits[:, -2:])
    torch.testing.assert_close(picked, plain.logits[:, [1, 4]])
    assert len(plain.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(plain.hidden_states[-1]), plain.logits)
    assert len(as_tuple) == 1


def test_save_and_load(mix: str, tmp_path) -> None:
    from farspan import FarspanForCausalLM

    model, ids = tiny(mix, tie_word_embeddings=mix == "metala"), _ids(1, 9)
    model.save_pretrained(tmp_path)
    again = FarspanForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (mix == "metala")


def test_bfloat16_model_keeps_float32_states() -> None:
    model, ids = tiny("metala").bfloat16(), _ids(1, 9)
    with torch.no_grad():
        cache = model.new_cache()
        logits = model(ids, past_key_values=cache).logits
    assert logits.dtype == torch.bfloat16
    assert cache.layers[0].get("recurrent").dtype == torch.float32


def test_autocast_runs_close_to_float32(mix: str) -> None:
    model, ids = tiny(mix, initializer_range=0.05), _ids(2, 12)
    plain = model(ids, labels=ids, output_logits=False).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, labels=ids, output_logits=False).loss
    rounded.backward()
    torch.testing.assert_close(rounded, plain, atol=2e-2, rtol=1e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiled_equals_eager(mix: str) -> None:
    layers = max(2, len(MIXES[mix]["mixers"]))  # two, since layers share what they form once; tracing takes long
    model, ids = tiny(mix, num_hidden_layers=layers).train(), _ids(2, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_resized_embeddings(mix: str) -> None:
    model, ids = tiny(mix), _ids(1, 5)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model(ids).logits.shape[-1] == 70


def test_skipped_positions_do_not_start_a_document(mix: str) -> None:
    model, ids = tiny(mix), _ids(1, 12)
    positions = torch.cat((torch.arange(6), torch.arange(100, 106))).unsqueeze(0)
    with torch.no_grad():
        alone = model(ids, position_ids=positions).logits
        batched = model(ids.repeat(2, 1), position_ids=positions.repeat(2, 1)).logits
    torch.testing.assert_close(alone[0], batched[0], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # raised inside Dynamo at a graph break
def test_documents_by_position_survive_compilation() -> None:
    model, ids = tiny("softmax"), _ids(1, 12)
    positions = torch.arange(6).repeat(2).unsqueeze(0)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(ids, position_ids=positions).logits
        torch.testing.assert_close(compiled, model(ids, position_ids=positions).logits, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_labels_do_not_reach_into_the_next_document(mix: str) -> None:
    model, ids = tiny(mix), _ids(1, 12)
    bounds = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    packed = model(ids, labels=ids, cu_seqlens=bounds).loss
    separate = [model(piece, labels=piece).loss * (piece.shape[1] - 1) for piece in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(packed, sum(separate) / 10, atol=1e-5, rtol=1e-4)


def test_a_refused_crop_leaves_a_hybrid_cache_whole() -> None:
    model, ids = tiny("hybrid", mixers=["softmax", "metala", "softmax"]), _ids(1, 12)
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        with pytest.raises(ConfigError, match="take back"):
            cache.crop(-3)
        rest = model(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 9:], atol=1e-4, rtol=1e-4)


def test_the_trainer_of_transformers_evaluates(tmp_path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in _ids(4, 8)]
    arguments = TrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(tiny("metala").train(), arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ShapeError, "exactly one"),
        ({"input_ids": _ids(1, 4), "output_attentions": True}, ConfigError, "no attention weights"),
        ({"input_ids": _ids(1, 4), "attention_mask": torch.ones(1, 6)}, ShapeError, r"\[B=1, T=4\]"),
        ({"input_ids": _ids(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)}, ShapeError, r"\[B=1, T=4\]"),
        ({"input_ids": _ids(1, 4), "position_ids": torch.arange(3)[None]}, ShapeError, "position_ids"),
        ({"input_ids": _ids(2, 4), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, ShapeError, "batch 1"),
        ({"input_ids": _ids(1, 4), "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, ShapeError, "cu_seqlens"),
        ({"input_ids": _ids(1, 4), "cu_seqlens": [0, 4]}, ShapeError, "int32 tensor"),
        ({"input_ids": _ids(1, 4).float()}, ShapeError, "input_ids is torch.float32"),
        ({"inputs_embeds": torch.zeros(1, 4, 7)}, ShapeError, r"D=32"),
        (
            {"input_ids": _ids(1, 4), "attention_mask": torch.full((1, 4), -1e9)},
            ShapeError,
            "other values than 0 and 1",
        ),
        ({"input_ids": _ids(1, 4), "lables": _ids(1, 4)}, ConfigError, "did you mean 'labels'"),
        ({"input_ids": _ids(1, 4), "labels": _ids(1, 4) - 99}, ShapeError, "labels hold"),
        ({"input_ids": _ids(1, 4), "labels": _ids(1, 4) + 99}, ShapeError, "labels hold"),
        ({"input_ids": _ids(1, 4), "labels": _ids(1, 4).float()}, ShapeError, "labels are torch.float32"),
    ],
)
def test_bad_inputs_have_one_clear_message(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny("metala")(**arguments)


@pytest.mark.parametrize("length", [0, -3])
def test_a_context_without_a_token_is_refused(length: int) -> None:
    model = tiny("softmax")
    for call in (lambda: model.new_cache(length), lambda: model(torch.tensor([[1, 2]]), context_length=length)):
        with pytest.raises(ConfigError, match=f"context_length={length} is not accepted; give the number of tokens"):
            call()


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
def test_a_batch_without_labels_costs_nothing(items: int | torch.Tensor) -> None:
    model, ids = tiny("softmax"), torch.tensor([[1, 2, 3]])
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
    loss.backward()
    assert loss == 0 and not model.lm_head.weight.grad.any()


def test_a_negative_number_of_labels_is_refused() -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match="num_items_in_batch=-1 is not accepted; accepted are counts of labels"):
        tiny("softmax")(ids, labels=ids, num_items_in_batch=-1)


def test_a_model_that_sees_what_it_would_predict_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"causal=False lets every position see .* take FarspanForMaskedLM"):
        tiny("softmax", causal=False)
