"""CoCA's checkpoints say that they are stock models; what could go wrong in silence is said or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan import FarspanConfig, FarspanForCausalLM
from farspan.errors import CheckpointError
from farspan.models.convert import convert, families
from farspan.models.convert.families import Published
from tests.models.tiny_families import published_checkpoint, save_published, tiny_model

_LENGTH = "max_position_embeddings"


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in state.items()}


def test_a_plain_llama_is_not_cocas(tmp_path: Path) -> None:
    _, config, state = published_checkpoint("llama")
    source = save_published(tmp_path / "source", config, state)
    assert convert(source, tmp_path / "ours", dry_run=True).family == "llama"
    with pytest.raises(
        CheckpointError, match=r"2 missing \(model.layers.0.self_attn.t_proj.weight.*It looks like LLaMA"
    ):
        convert(source, tmp_path / "ours", family="coca-llama")
    renamed = {name.replace("k_proj", "t_proj"): x for name, x in state.items()}
    assert families.detect(Published(config, _shapes(renamed))).name == "coca-llama"
    with pytest.raises(CheckpointError, match="k_proj"):
        convert(save_published(tmp_path / "other", config, renamed), tmp_path / "ours", family="llama")


def test_the_trained_length_by_its_other_name(tmp_path: Path) -> None:
    """`max_sequence_length` counts, with a note, unless the field that the published code reads is there, too."""
    _, config, state = published_checkpoint("coca-llama")
    renamed = {**_without(config, _LENGTH, "attention_type"), "max_sequence_length": 512}
    source = save_published(tmp_path / "source", renamed, state)
    done = convert(source, tmp_path / "ours")
    assert done.config[_LENGTH] == 512
    assert [note for note in done.notes if "max_sequence_length=512; the published code does not read" in note]
    convert(tmp_path / "ours", tmp_path / "back", to="original")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(json.dumps(renamed))

    both = save_published(tmp_path / "both", {**renamed, _LENGTH: 2048}, state)
    done = convert(both, tmp_path / "ours", dry_run=True)
    assert done.config[_LENGTH] == 2048
    assert not [note for note in done.notes if "max_sequence_length" in note]


def test_a_rotary_base_that_the_published_code_does_not_read() -> None:
    _, config, state = published_checkpoint("coca-llama")
    read, names = families.get("coca-llama").read_config, _shapes(state)
    assert read(Published({**config, "rope_theta": 10000.0}, names)).rope_parameters["rope_theta"] == 10000.0
    with pytest.raises(CheckpointError, match=r"rope_theta=1000000\.0, which cannot be converted; accepted: 10000"):
        read(Published({**config, "rope_theta": 1e6}, names))


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("family", ["coca-llama", "coca-neox"])
def test_rotations_that_coca_does_not_have(family: str, kind: str) -> None:
    _, config, state = published_checkpoint(family)
    with pytest.raises(CheckpointError, match=f"rope_scaling='{kind}', which cannot be converted; accepted: 'default'"):
        families.get(family).read_config(
            Published({**config, "rope_scaling": {"type": kind, "factor": 2.0}}, _shapes(state))
        )


def test_stretched_frequencies_are_not_read(tmp_path: Path) -> None:
    """A long input stretches them in the published code, and saving keeps them so."""
    _, config, state = published_checkpoint("coca-neox")
    for name in ("layers.0", "layers.1"):
        state[f"gpt_neox.{name}.attention.rotary_emb.inv_freq"] = torch.tensor([0.7, 0.003])
    done = convert(save_published(tmp_path / "source", config, state), tmp_path / "ours")
    assert len(done.derived) == 2
    assert [note for note in done.notes if "inv_freq" in note and "computed anew" in note]
    ids = torch.randint(0, 61, (1, 20))
    with torch.no_grad():
        found = FarspanForCausalLM.from_pretrained(tmp_path / "ours").eval()(ids).logits
        assert torch.equal(found, tiny_model("coca-neox").eval()(ids).logits)


def test_starting_from_a_plain_llama() -> None:
    """All but the T projection has one name in both, so that a state dict goes over."""
    stock = tiny_model("llama")
    config = FarspanConfig(**{**stock.config.to_diff_dict(), "mixers": ["collinear"]})
    ours = FarspanForCausalLM(config)
    missing, unknown = ours.load_state_dict(stock.state_dict(), strict=False)
    assert missing == [f"model.layers.{i}.mixer.t_proj.weight" for i in range(2)]
    assert unknown == [f"model.layers.{i}.mixer.k_proj.weight" for i in range(2)]
