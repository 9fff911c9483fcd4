"""Stock language models, built at random by transformers itself, convert to models that compute the same."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import farspan.models
from farspan.errors import CheckpointError
from farspan.models.convert import families
from farspan.models.convert.families import Published
from farspan.models.convert.names import Copy, to_ours, to_published
from farspan.models.modeling import FarspanPreTrainedModel

SIZES = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTATIONS = {
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8},
    "llama3": {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 8},
}
CASES: dict[str, tuple[str, type, type, dict[str, Any]]] = {
    "llama": ("llama", LlamaConfig, LlamaForCausalLM, {}),
    "llama/grouped": ("llama", LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "head_dim": 12}),
    "llama/tied": ("llama", LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama/biased": ("llama", LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-3}),
    "qwen3/biased": (
        "qwen3",
        Qwen3Config,
        Qwen3ForCausalLM,
        {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 12, "num_key_value_heads": 4},
    ),
    "qwen3/window": (
        "qwen3",
        Qwen3Config,
        Qwen3ForCausalLM,
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "gpt_neox": ("gpt_neox", GPTNeoXConfig, GPTNeoXForCausalLM, {"rotary_pct": 0.5}),
    "gpt_neox/sequential": (
        "gpt_neox",
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {"rotary_pct": 1.0, "use_parallel_residual": False, "hidden_act": "gelu_new"},
    ),
    "gpt_neox/plain": (
        "gpt_neox",
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {"attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 0.25},
    ),
    **{
        f"llama/{name}": ("llama", LlamaConfig, LlamaForCausalLM, {"rope_parameters": rope})
        for name, rope in ROTATIONS.items()
    },
}


def stock(case: str) -> tuple[str, PreTrainedModel]:
    """The family's name and a random model of transformers, with norms and biases away from where they start."""
    family, config, model, fields = CASES[case]
    torch.manual_seed(0)
    theirs = model(config(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return family, theirs


def converted(theirs: PreTrainedModel, family: str) -> FarspanPreTrainedModel:
    """Our model, by way of what a checkpoint holds; the family has to be found out."""
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        state = load_file(f"{directory}/model.safetensors")
        config = json.loads(Path(directory, "config.json").read_text())
    published = Published(config, {name: tuple(x.shape) for name, x in state.items()})
    found = families.detect(published)
    assert found.name == family
    config = found.read_config(published)
    entries = found.entries(config)
    ours = getattr(farspan.models, config.architectures[0])(config).eval()
    missing, unexpected = ours.load_state_dict(to_ours(state, entries), strict=False)
    assert not unexpected
    assert set(missing) <= set(ours.all_tied_weights_keys)
    back = to_published(to_ours(state, entries), entries)
    tied = {entry.published for entry in entries if isinstance(entry, Copy)}
    assert back.keys() - tied == state.keys() - tied
    assert all(back[name].equal(x) for name, x in state.items())
    again = found.read_config(Published(found.write_config(config), published.shapes))
    assert again.to_diff_dict() == config.to_diff_dict()
    return ours


def prompt(length: int, rows: int = 2) -> Tensor:
    return torch.randint(3, 71, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_loss(case: str) -> None:
    family, theirs = stock(case)
    ours, ids = converted(theirs, family), prompt(14)
    with torch.no_grad():
        want = theirs(ids, labels=ids, output_hidden_states=True)
        got = ours(ids, labels=ids, output_hidden_states=True)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-4, rtol=1e-4)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_padding(case: str, side: str) -> None:
    family, theirs = stock(case)
    ours, ids = converted(theirs, family), prompt(12)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, position_ids=positions).logits
        got = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "dynamic" not in case])
def test_beyond_the_trained_length(case: str) -> None:
    family, theirs = stock(case)
    ours, ids = converted(theirs, family), prompt(40)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case: str, padded: bool) -> None:
    family, theirs = stock(case)
    ours, ids = converted(theirs, family), prompt(7, rows=3)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
        ids[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()


@pytest.mark.parametrize("model", [LlamaForSequenceClassification, GPTNeoXForSequenceClassification])
def test_classifiers(model: type) -> None:
    config = LlamaConfig if model is LlamaForSequenceClassification else GPTNeoXConfig
    torch.manual_seed(0)
    theirs = model(config(**SIZES, num_labels=3)).eval()
    ours, ids = converted(theirs, "llama" if config is LlamaConfig else "gpt_neox"), prompt(9)
    ids[0, 6:] = 0
    mask = (ids != 0).long()
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, labels=torch.tensor([2, 0]))
        got = ours(ids, attention_mask=mask, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-4, rtol=1e-4)


def test_a_stack_without_a_head() -> None:
    torch.manual_seed(0)
    theirs = LlamaModel(LlamaConfig(**SIZES)).eval()
    ours, ids = converted(theirs, "llama"), prompt(9)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, atol=1e-4, rtol=1e-4)


def shapes(theirs: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in theirs.state_dict().items()}


def test_other_models_with_these_names_are_not_taken_for_them() -> None:
    _, theirs = stock("llama")
    config = theirs.config.to_dict()
    with pytest.raises(CheckpointError, match="No known family"):
        families.detect(Published({**config, "model_type": "cohere"}, shapes(theirs)))


def test_rotations_that_are_not_here_are_refused() -> None:
    _, theirs = stock("llama")
    rope = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(CheckpointError, match="the rotation 'longrope'"):
        families.get("llama").read_config(Published({**theirs.config.to_dict(), **rope}, shapes(theirs)))


def test_old_configurations_are_read() -> None:
    """As transformers wrote them before rope_parameters."""
    _, theirs = stock("llama/grouped")
    config = theirs.config.to_dict()
    del config["rope_parameters"]
    config |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    ours = families.get("llama").read_config(Published(config, shapes(theirs)))
    assert ours.rope_parameters == {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    _, theirs = stock("gpt_neox")
    config = {name: value for name, value in theirs.config.to_dict().items() if name != "rope_parameters"}
    config |= {"rotary_pct": 0.75, "rotary_emb_base": 777.0}
    ours = families.get("gpt_neox").read_config(Published(config, shapes(theirs)))
    assert (ours.rope_parameters["rope_theta"], ours.mixer_options["softmax"]["partial_rotary_factor"]) == (777.0, 0.75)


def test_an_old_gpt_neox_with_buffers_has_to_be_named() -> None:
    """Stock checkpoints of old releases and CoCA's have the same names; nothing is guessed."""
    _, theirs = stock("gpt_neox")
    config = {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    buffers = {f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": (2,) for i in range(3)}
    old = Published(config, shapes(theirs) | buffers)
    with pytest.raises(CheckpointError, match=r"coca-neox, gpt_neox; name one with --family"):
        families.detect(old)
    assert families.detect(Published({**config, "attention_type": "collinear"}, old.shapes)).name == "coca-neox"
    assert families.detect(Published({**config, "attention_bias": True}, old.shapes)).name == "gpt_neox"
    assert all(families.get("gpt_neox").ignores(name) for name in buffers)


def test_rotations_as_old_releases_wrote_them() -> None:
    """`rope_scaling` counts before `rope_parameters`, and what stands beside it is the base alone."""
    _, theirs = stock("llama/llama3")
    config = theirs.config.to_dict()
    config |= {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 300.0}
    want = LlamaConfig(**config).rope_parameters
    ours = families.get("llama").read_config(Published(config, shapes(theirs))).rope_parameters
    assert ours == {name: want[name] for name in ours} and ours["rope_theta"] == 300.0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_absent_settings_are_the_published_defaults_or_the_shapes(family: str) -> None:
    case = "qwen3/window" if family == "qwen3" else family
    _, theirs = stock(case)
    known = ("num_attention_heads",) if family != "qwen3" else ()
    config = {"model_type": family, **{name: SIZES[name] for name in known}}
    ours = families.get(family).read_config(Published(config, shapes(theirs)))
    default = CASES[case][1]()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "hidden_act"):
        assert getattr(ours, name) == getattr(default, name)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, name) == getattr(theirs.config, name)
    if family == "qwen3":
        assert (ours.num_key_value_heads, ours.head_dim) == (1, 8)
