"""What transformers tests on its own models: loading, initialisation, outputs, embeddings, training, devices."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farspan import FarspanConfig, FarspanForCausalLM, FarspanModel
from farspan.errors import ConfigError
from tests.models.conftest import MIXES, tiny

MIXERS = ("collinear", "cosine", "dilated", "dynamic_mask", "hybrid", "metala", "softmax", "ssd")
WITH_WEIGHTS = sorted(name for name in MIXES if not name.startswith(("cosine", "metala", "ssd")))


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> str:
    return request.param


def _ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(4))


def _logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**{"input_ids": _ids(), **inputs}).logits


# Saving and loading


def test_a_sharded_checkpoint_loads_bit_for_bit(mixer: str, tmp_path: Path) -> None:
    model = tiny(mixer)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, report = FarspanForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, parameter in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_dtype_arguments(mixer: str, argument: str, tmp_path: Path) -> None:
    tiny(mixer).bfloat16().save_pretrained(tmp_path)
    for given, expected in ((torch.float32, torch.float32), ("float16", torch.float16), ("auto", torch.bfloat16)):
        model = FarspanForCausalLM.from_pretrained(tmp_path, **{argument: given})
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_the_stack_and_the_language_model_load_from_one_another(mixer: str, tmp_path: Path) -> None:
    model = tiny(mixer)
    model.save_pretrained(tmp_path / "whole")
    stack = FarspanModel.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(stack(_ids()).last_hidden_state), _logits(model))
    stack.save_pretrained(tmp_path / "stack")
    headed, report = FarspanForCausalLM.from_pretrained(tmp_path / "stack", output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(headed.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_an_attribute_that_is_no_field_does_not_spoil_the_checkpoint(tmp_path: Path) -> None:
    model = tiny("softmax")
    model.config.mark = "mine"
    model.save_pretrained(tmp_path)
    assert not hasattr(FarspanForCausalLM.from_pretrained(tmp_path).config, "mark")


# Initialisation


def test_every_parameter_is_initialised_from_the_meta_device(mix: str) -> None:
    config = tiny(mix).config
    with torch.device("meta"):
        model = FarspanForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


def test_what_was_loaded_is_not_initialised_again(mixer: str) -> None:
    states = tiny(mixer).state_dict()
    absent = {name for name in states if ".layers.1." in name}
    held = {name: tensor for name, tensor in states.items() if name not in absent}
    model, report = FarspanForCausalLM.from_pretrained(
        None, config=tiny(mixer).config, state_dict=held, output_loading_info=True
    )
    assert report["missing_keys"] == absent
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all() if name in absent else torch.equal(tensor, states[name]), name


def test_a_missing_parameter_of_a_mixer_is_the_only_one_initialised(mix: str) -> None:
    """`reset_parameters` sets all that a module owns; what was loaded has to survive it."""
    model = tiny(mix)
    states, mixer = model.state_dict(), model.model.layers[1].mixer
    for absent in (f"model.layers.1.mixer.{name}" for name, _ in mixer.named_parameters(recurse=False)):
        held = {name: tensor for name, tensor in states.items() if name != absent}
        loaded = FarspanForCausalLM.from_pretrained(None, config=model.config, state_dict=held).state_dict()
        assert loaded[absent].isfinite().all()
        for name, tensor in held.items():
            assert torch.equal(loaded[name], tensor), f"{name} without {absent}"


def test_a_model_is_deterministic(mixer: str) -> None:
    model = tiny(mixer, hidden_dropout=0.5)
    assert torch.equal(_logits(model), _logits(model))
    assert torch.equal(_logits(tiny(mixer)), _logits(tiny(mixer)))
    assert not torch.equal(_logits(model.train()), _logits(model))


# Outputs


def test_a_batch_is_its_rows(mixer: str) -> None:
    model, ids = tiny(mixer), _ids(3)
    together = _logits(model, input_ids=ids)
    for row in range(3):
        alone = _logits(model, input_ids=ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mix", WITH_WEIGHTS)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_weights_are_those_of_the_output(mix: str, padded: bool) -> None:
    model, ids = tiny(mix), _ids()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask)
        observed = model(ids, attention_mask=mask, output_attentions=True)
    real = mask.bool()
    # The outputs are formed from the weights: wrong weights would be wrong outputs.
    torch.testing.assert_close(observed.logits[real], plain.logits[real], atol=1e-4, rtol=1e-4)
    able = [block for block in model.model.blocks if block.mixer.attention_weights]
    assert len(observed.attentions) == len(able) > 0
    for weights in observed.attentions:
        assert weights.shape == (2, 4, 9, 9)
        assert not weights.triu(1).any(), "a token reads its future"
        assert not weights[0, :, :, ~real[0]].any(), "padding is read"
        if mix != "dilated_xpos" and not mix.endswith("relu"):  # there a query may have no key at all
            torch.testing.assert_close(weights.sum(-1)[:, 0][real], torch.ones(int(real.sum())))


def test_attention_weights_behind_a_cache(mixer: str) -> None:
    model, ids = tiny(mixer), _ids()
    if not any(block.mixer.attention_weights for block in model.model.blocks):
        with pytest.raises(ConfigError, match=f"{mixer}.*no attention weights"):
            model(ids, output_attentions=True)
        return
    with torch.no_grad():
        whole = model(ids, output_attentions=True, use_cache=False).attentions
        cache = model(ids[:, :6], output_attentions=True).past_key_values
        if mixer in ("dilated", "dynamic_mask"):
            with pytest.raises(ConfigError, match="use_cache=False"):
                model(ids[:, 6:], past_key_values=cache, output_attentions=True)
            return
        rest = model(ids[:, 6:], past_key_values=cache, output_attentions=True).attentions
    for ours, theirs in zip(rest, whole, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, 6:], atol=1e-4, rtol=1e-4)


def test_attention_weights_of_softmax_are_the_formula() -> None:
    model = tiny("softmax", mixer_options={"softmax": {"rope": False}}, num_key_value_heads=4)
    captured: list[Tensor] = []
    mixer = model.model.layers[0].mixer
    mixer.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    weights = model(_ids(), output_attentions=True).attentions[0]
    heads = (mixer.heads, mixer.head_dim)
    q, k = (project(captured[0]).unflatten(-1, heads).transpose(1, 2) for project in (mixer.q_proj, mixer.k_proj))
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / mixer.head_dim**0.5).masked_fill(future, float("-inf"))
    torch.testing.assert_close(weights, scores.softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixer", ["collinear", "dilated", "dynamic_mask", "hybrid", "softmax"])
def test_gradients_reach_hidden_states_and_attentions(mixer: str) -> None:
    out = tiny(mixer)(_ids(), output_hidden_states=True, output_attentions=True)
    for kept in (*out.hidden_states, *out.attentions):
        kept.retain_grad()
    out.logits.flatten()[-1].backward()
    assert len(out.hidden_states) == 4
    for kept in (*out.hidden_states, *out.attentions):
        assert kept.grad is not None and kept.grad.any()


def test_a_tuple_holds_what_the_record_holds(mixer: str) -> None:
    model = tiny(mixer)
    for request in ({}, {"output_hidden_states": True}, {"labels": _ids(), "use_cache": False}):
        record = model(_ids(), **request)
        as_tuple = model(_ids(), return_dict=False, **request)
        for ours, theirs in zip(as_tuple, record.to_tuple(), strict=True):
            if isinstance(ours, Tensor):
                torch.testing.assert_close(ours, theirs)
            else:
                assert type(ours) is type(theirs)


def test_the_configuration_sets_what_the_call_leaves_out() -> None:
    model = tiny("softmax")
    model.set_attn_implementation("eager")  # the config of transformers asks for it before it takes the wish
    model.config.output_hidden_states = model.config.output_attentions = True
    model.config.use_cache = False
    out = model(_ids())
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3 and out.past_key_values is None
    assert model(_ids(), output_attentions=False).attentions is None
    model.config.return_dict = False
    assert isinstance(model(_ids(), return_dict=True), dict)


def test_aligned_labels_replace_labels(mixer: str) -> None:
    model, ids = tiny(mixer), _ids()
    aligned = ids.flip(0)
    loss = model(ids, shift_labels=aligned).loss
    assert torch.equal(model(ids, labels=ids, shift_labels=aligned).loss, loss)
    assert not torch.equal(model(ids, labels=ids).loss, loss)


# Embeddings


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_resized_embeddings_keep_what_was_learned(tied: bool, bias: bool, tmp_path: Path) -> None:
    model = tiny("hybrid", tie_word_embeddings=tied, lm_head_bias=bias)
    before = _logits(model)
    for size, options in ((70, {"mean_resizing": False}), (61, {}), (64, {"pad_to_multiple_of": 64})):
        model.resize_token_embeddings(size if "pad_to_multiple_of" not in options else None, **options)
        assert model.config.vocab_size == size == model.get_input_embeddings().num_embeddings
        assert model.lm_head.out_features == size
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert model.lm_head.bias is None or model.lm_head.bias.shape == (size,)
        torch.testing.assert_close(_logits(model)[..., :61], before)
    model(_ids(), labels=_ids()).loss.backward()
    model.save_pretrained(tmp_path)
    again = FarspanForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(again), _logits(model))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


def test_embeddings_can_be_read_and_replaced(mixer: str) -> None:
    model = tiny(mixer)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.get_output_embeddings() is model.lm_head
    new = nn.Embedding(10, 32)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new and model.model.embed_tokens is new
    head = nn.Linear(32, 10, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head


def test_a_tie_is_stored_once_and_made_again(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny("hybrid", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - the file is no dict
    again, report = FarspanForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert copy.deepcopy(again).lm_head.weight is not again.lm_head.weight


# Training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds(mixer: str, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny(mixer).train()
        if checkpointing:
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, model.gradient_checkpointing_enable)
            argument = "activation_checkpointing_kwargs" if hasattr(model, name) else "gradient_checkpointing_kwargs"
            enable(**{argument: {"use_reentrant": reentrant}})
            assert model.model.layers[0].gradient_checkpointing
        model(_ids(), labels=_ids()).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_the_trainer_smooths_shifted_labels(tmp_path: Path) -> None:
    """It shifts them only for classes whose names it knows."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, ids = tiny("metala"), _ids()
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    trainer = Trainer(model, arguments)
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
        log = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -0.9 * log.gather(-1, ids[:, 1:, None]).mean() - 0.1 * log.mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks by the older of two names
def test_lora_adapts_and_merges(mixer: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'farspan[post]'")
    model, ids = tiny(mixer), _ids()
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".mixer." in n}
    before = _logits(model)
    settings = peft.LoraConfig(target_modules=sorted({*names, "lm_head"}), r=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    torch.testing.assert_close(_logits(adapted), before)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    changed, loss = _logits(adapted), adapted(input_ids=ids, labels=ids).loss
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(_logits(merged), changed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged(ids, labels=ids).loss, loss, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed, before, atol=1e-2)


# Devices and dtypes


def _split(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Embeddings and first layer in memory, the rest on disk."""
    places = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(3)} | {"lm_head": "disk"}
    return {"device_map": places, "offload_folder": folder}


def _auto(model: nn.Module, folder: Path) -> dict[str, Any]:
    return {"device_map": "auto"}


def _little_memory(model: nn.Module, folder: Path) -> dict[str, Any]:
    return {"device_map": "auto", "max_memory": {"cpu": 40_000}, "offload_folder": folder}


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # transformers 5.17: all is on the disk
@pytest.mark.parametrize("place", [_auto, _split, _little_memory])
def test_device_maps(mixer: str, place: Callable[[nn.Module, Path], dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = tiny(mixer)
    model.save_pretrained(tmp_path / "saved")
    placed = FarspanForCausalLM.from_pretrained(tmp_path / "saved", **place(model, tmp_path / "off")).eval()
    assert any(parameter.is_meta for parameter in placed.parameters()) == (place is not _auto)
    torch.testing.assert_close(_logits(placed), _logits(model))
    with torch.no_grad():
        torch.testing.assert_close(placed(_ids(), labels=_ids()).loss, model(_ids(), labels=_ids()).loss)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert placed.generate(_ids(), **options).tolist() == model.generate(_ids(), **options).tolist()


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_half_precision_keeps_float32_states(mixer: str, cast: str) -> None:
    model = getattr(tiny(mixer), cast)()
    cache = model.new_cache()
    logits = _logits(model, past_key_values=cache)
    assert logits.dtype == model.dtype and logits.isfinite().all()
    states = [layer.tensors["recurrent"] for layer in cache.layers if "recurrent" in layer.tensors]
    assert all(state.dtype == torch.float32 for state in states)
    assert bool(states) == (mixer in ("cosine", "hybrid", "metala", "ssd"))
    assert model.generate(_ids(), max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_scaled_positions_take_effect_where_they_should(rope_type: str) -> None:
    """As in transformers: dynamic NTK leaves short texts alone and counts from the model's own trained length."""
    plain = tiny("softmax", max_position_embeddings=16)
    scaled = tiny(
        "softmax",
        max_position_embeddings=16,
        rope_parameters={"rope_type": rope_type, "factor": 4.0}
        | ({"original_max_position_embeddings": 64} if rope_type == "dynamic" else {}),
    )
    for length, same in ((8, rope_type == "dynamic"), (24, False)):
        ids = _ids(1, length)
        assert torch.allclose(_logits(plain, input_ids=ids), _logits(scaled, input_ids=ids), atol=1e-5) == same


def test_the_attention_implementation_is_accepted() -> None:
    """`attn_implementation` is accepted and changes nothing: the operators choose their own backends."""
    config = FarspanConfig(**tiny("softmax").config.to_dict())
    for implementation in ("eager", "sdpa"):
        model = FarspanForCausalLM._from_config(copy.deepcopy(config), attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
