"""Doge of transformers, built at random by it, converts to a model that computes the same; and its other forms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DogeConfig, DogeForCausalLM, DogeForSequenceClassification

from farspan import FarspanForCausalLM
from farspan.errors import CheckpointError
from farspan.models.convert import convert, families
from farspan.models.convert.families import Published
from farspan.models.convert.names import current_name
from farspan.nn.experts.balance import auxiliary_loss, load_balance
from farspan.nn.feed_forward import AuxiliaryRecord
from tests.models.test_transformers_parity import LLAMA3, ROTATIONS, SIZES, converted, prompt, shapes
from tests.models.tiny_families import published_checkpoint, save_published

GROUPED = {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}
EXPERTS = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}
# Without a selection, the order of equal keys, which is arbitrary in transformers, means nothing.
CASES: dict[str, dict[str, Any]] = {
    "grouped": GROUPED,
    "plain": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "one key head": {"num_key_value_heads": 1, "hidden_act": "gelu"},
    "window": {**GROUPED, "sliding_window": 6},
    **{name: {**GROUPED, "rope_parameters": rope} for name, rope in ROTATIONS.items()},
}
SELECTED = {
    "selected": {**GROUPED, "keep_window_size": 5},
    "selected in a window": {**GROUPED, "keep_window_size": 4, "sliding_window": 7},
}
ROUTED = {
    "experts": {**GROUPED, **EXPERTS},
    "normed experts": {**GROUPED, **EXPERTS, "norm_topk_prob": True, "keep_window_size": 5},
    "experts in a window": {**GROUPED, **EXPERTS, "keep_window_size": 4, "sliding_window": 6},
}


def stock(model: type = DogeForCausalLM, **fields: Any) -> Any:
    """A random model of transformers, with norms, residuals and A away from where they start."""
    torch.manual_seed(0)
    theirs = model(DogeConfig(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs


def distinct(length: int, rows: int = 2) -> Tensor:
    """Texts without a repeated token: no two biases of the first layer are equal."""
    generator = torch.Generator().manual_seed(length)
    return torch.stack([3 + torch.randperm(68, generator=generator)[:length] for _ in range(rows)])


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [*CASES, *SELECTED, *ROUTED])
def test_logits_hidden_states_and_loss(case: str) -> None:
    theirs = stock(**{**CASES, **SELECTED, **ROUTED}[case])
    ours, ids = converted(theirs, "doge-moe" if case in ROUTED else "doge"), distinct(14)
    with torch.no_grad():
        want = theirs(ids, labels=ids, output_hidden_states=True)
        got = ours(ids, labels=ids, output_hidden_states=True)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        close(a, b)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", [*CASES, *SELECTED, *ROUTED])
def test_padding(case: str, side: str) -> None:
    """The published window counts places, padding included, and so do its positions unless they are given."""
    theirs = stock(**{**CASES, **SELECTED, **ROUTED}[case])
    ours, ids = converted(theirs, "doge-moe" if case in ROUTED else "doge"), distinct(12)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, position_ids=positions).logits
        got = ours(ids, attention_mask=mask).logits
    close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("case", [case for case in [*CASES, *SELECTED, *ROUTED] if case != "dynamic"])
def test_beyond_the_trained_length(case: str) -> None:
    theirs = stock(**{**CASES, **SELECTED, **ROUTED}[case])
    ours, ids = converted(theirs, "doge-moe" if case in ROUTED else "doge"), distinct(40)
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case: str, padded: bool) -> None:
    theirs = stock(**CASES[case])
    ours, ids = converted(theirs, "doge"), prompt(7, rows=3)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
        ids[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens_routed_by_one_another(padded: bool) -> None:
    """Three rows are routed together, in the prompt, padding included, and in every step."""
    theirs = stock(**ROUTED["experts"])
    ours, ids = converted(theirs, "doge-moe"), prompt(7, rows=3)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
        ids[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()


@pytest.mark.parametrize("case", SELECTED)
def test_decoding_where_keys_are_selected(case: str) -> None:
    theirs = stock(**SELECTED[case])
    ours, ids = converted(theirs, "doge"), distinct(20)
    with torch.no_grad():
        cache, theirs_cache = ours.new_cache(), None
        for piece in ids.split([9, *[1] * 11], dim=1):
            want = theirs(piece, past_key_values=theirs_cache, use_cache=True)
            theirs_cache = want.past_key_values
            close(ours(piece, past_key_values=cache).logits, want.logits)


def test_the_balancing_loss_and_its_gradients() -> None:
    """One loss of all layers together."""
    theirs = stock(**ROUTED["experts"], output_router_logits=True, router_aux_loss_coef=0.5)
    ours, ids = converted(theirs, "doge-moe").train(), distinct(12)
    want, got = theirs(ids, labels=ids), ours(ids, labels=ids)
    close(got.aux_loss, 0.5 * want.aux_loss)
    close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    for a, b in zip(ours.model.blocks, theirs.model.layers, strict=True):
        close(a.feed_forward.experts.router.gate.weight.grad, b.mlp.router_gate.weight.grad)
        close(a.feed_forward.experts.up.grad, b.mlp.up_embed.weight.grad)
        close(a.mixer.bias_scale.grad, b.self_attn.A.grad)
        close(a.mixer_residual.grad, b.input_residual.grad)


def test_losses_of_layers_are_pooled_by_kind_or_added() -> None:
    loads, probabilities = torch.rand(3, 4).softmax(-1), torch.rand(3, 4).softmax(-1)
    records = [AuxiliaryRecord(None, {}, f, p, 0.5) for f, p in zip(loads, probabilities, strict=True)]
    pooled = 0.5 * load_balance(loads.mean(0), probabilities.mean(0))
    torch.testing.assert_close(auxiliary_loss([*records, None]), pooled)
    other = AuxiliaryRecord(None, {}, loads[0], probabilities[0], 2.0)
    alone = AuxiliaryRecord(torch.tensor(3.0), {}, loads[1], probabilities[1])
    both = pooled + 2 * load_balance(loads[0], probabilities[0]) + 3
    torch.testing.assert_close(auxiliary_loss([*records, other, alone]), both)
    assert auxiliary_loss([None, AuxiliaryRecord(None, {}, loads[0], probabilities[0])]) is None


def test_classifier() -> None:
    theirs = stock(DogeForSequenceClassification, **GROUPED, num_labels=3)
    ours, ids = converted(theirs, "doge"), distinct(9)
    ids[0, 6:] = 0
    mask = (ids != 0).long()
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, labels=torch.tensor([2, 0]))
        got = ours(ids, attention_mask=mask, labels=torch.tensor([2, 0]))
    close(got.logits, want.logits)
    close(got.loss, want.loss)


def published(case: str, **config: Any) -> Published:
    """A tiny checkpoint of a family with some fields of its configuration changed; "absent" takes one away."""
    _, written, state = published_checkpoint(case)
    changed = {name: value for name, value in (written | config).items() if value != "absent"}
    return Published(changed, {name: tuple(x.shape) for name, x in state.items()})


@pytest.mark.parametrize(
    ("case", "config", "message"),
    [
        ("doge-seed", {"dynamic_mask_ratio": 0.2}, "dynamic_mask_ratio=0.2"),
        ("doge", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("doge", {"is_moe": True}, "is_moe=True"),
        ("doge-seed", {"is_moe": True}, "is_moe=True"),
        ("doge-seed/experts", {"is_moe": False}, "is_moe=False"),
        ("doge-moe", {"is_moe": False}, "is_moe=False"),
        ("doge", {"window_size": 64}, "keep_window_size .* and window_size"),
        ("doge", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "the rotation 'longrope'"),
    ],
)
def test_settings_that_are_not_here_are_refused(case: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        families.detect(found := published(case, **config)).read_config(found)


def test_defaults_of_the_seed() -> None:
    """Its class stretches positions and ties the head unless it is told otherwise."""
    found = published("doge-seed", rope_scaling="absent", tie_word_embeddings="absent", num_attention_heads=4)
    config = families.get("doge-seed").read_config(found)
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert config.tie_word_embeddings and (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)


def test_the_seed_without_its_dynamic_bias() -> None:
    """`is_causal` leaves the bias unused; its parameters are held for the way back and take part in nothing."""
    family, found = families.get("doge-seed"), published("doge-seed", is_causal=True)
    config = family.read_config(found)
    options = config.mixer_options["dynamic_mask"]
    assert (options["bias_form"], options["unused_bias"]) == ("none", True)
    assert family.write_config(config)["is_causal"] is True
    entries = family.entries(config)
    assert {entry.published for entry in entries if entry.our_names()} == set(found.shapes) - {"lm_head.weight"}
    torch.manual_seed(0)
    model, ids = FarspanForCausalLM(config).eval(), torch.randint(0, 61, (2, 9))
    before = model(ids).logits
    model(ids, labels=ids).loss.backward()
    for block in model.model.blocks:
        assert block.mixer.bias_scale.grad is None and block.mixer.bias_proj.weight.grad is None
        nn.init.normal_(block.mixer.bias_scale)
    assert model(ids).logits.equal(before)


def test_early_names() -> None:
    assert current_name("model.layers.3.input_residual.weight") == "model.layers.3.input_residual"
    assert current_name("model.layers.3.post_attention_residual.weight") == "model.layers.3.post_attention_residual"
    assert current_name("layers.3.feed_forward.queries_proj.weight") == "layers.3.feed_forward.queries.weight"
    seed = "model.layers.3.pre_residual.weight"
    assert current_name(seed) == seed


def test_early_names_are_converted_and_come_back(tmp_path: Path) -> None:
    _, config, state = published_checkpoint("doge-small")
    early = {f"{name}.weight" if name.endswith("_residual") else name: x for name, x in state.items()}
    source = save_published(tmp_path / "source", config, early)
    assert convert(source, tmp_path / "ours").family == "doge-small"
    convert(tmp_path / "ours", tmp_path / "back", to="original")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == early.keys() and all(back[name].equal(x) for name, x in early.items())


def test_routing_across_tokens_is_said_and_can_be_denied(tmp_path: Path) -> None:
    """A later token changes what was said before it, or not."""
    _, config, state = published_checkpoint("doge-moe")
    ids = distinct(8, rows=1) % 61
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 61], dim=1)
    for mixing in (True, False):
        source = save_published(tmp_path / f"source {mixing}", {**config, "token_mixing": mixing}, state)
        done = convert(source, tmp_path / f"ours {mixing}")
        assert any("by the scores of other tokens" in note for note in done.notes)
        model = FarspanForCausalLM.from_pretrained(tmp_path / f"ours {mixing}").eval()
        with torch.no_grad():
            first, second = (model(text).logits[:, :-1] for text in (ids, other))
        assert torch.allclose(first, second, atol=1e-5) is not mixing


def test_the_newest_form() -> None:
    found = published("doge-moe/newest")
    assert found.config["window_size"] == 8 and "keep_window_size" not in found.config
    config = families.get("doge-moe").read_config(Published({**found.config, "token_mixing": False}, found.shapes))
    options = config.mixer_options["dynamic_mask"]
    assert (options["bias_form"], options["select"], options["keep_window_size"]) == ("linear", "topk_global", 8)
    without = {name: value for name, value in found.config.items() if name != "token_mixing"}
    assert (
        not families.get("doge-moe")
        .read_config(Published(without, found.shapes))
        .feed_forward_options["cdmoe"]["token_mixing"]
    )


def test_old_rotations_of_the_current_names() -> None:
    theirs = stock(**GROUPED)
    config = {name: value for name, value in theirs.config.to_dict().items() if name != "rope_parameters"}
    config |= {"rope_theta": 500.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8}}
    ours = families.get("doge").read_config(Published(config, shapes(theirs)))
    assert ours.rope_parameters["rope_type"] == "llama3" and ours.rope_parameters["rope_theta"] == 500.0
