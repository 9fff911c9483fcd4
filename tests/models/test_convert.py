"""Converting checkpoints: every family both ways, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import farspan.models
from farspan.models.convert import convert, families
from tests.models.tiny_families import TINY, family_of, published_checkpoint, save_published


@pytest.mark.parametrize("case", sorted(TINY))
def test_every_family_both_ways(case: str, tmp_path: Path) -> None:
    model, config, state = published_checkpoint(case, torch.bfloat16)
    source = save_published(tmp_path / "source", config, state)
    done = convert(source, tmp_path / "ours")
    assert (done.family, done.architecture) == (family_of(case).name, type(model).__name__)
    assert done.parameters == sum(parameter.numel() for parameter in model.parameters())
    auto = AutoModelForCausalLM if done.architecture == "FarspanForCausalLM" else AutoModel
    assert "Farspan" in type(auto.from_pretrained(tmp_path / "ours")).__name__
    loaded = getattr(farspan.models, done.architecture).from_pretrained(tmp_path / "ours")
    assert loaded.dtype == torch.bfloat16
    want, got = model.state_dict(), loaded.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)

    convert(tmp_path / "ours", tmp_path / "back", to="original")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(back[name].dtype == x.dtype and torch.equal(back[name], x) for name, x in state.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(json.dumps(config))


def test_every_family_is_in_the_table() -> None:
    assert {family_of(case).name for case in TINY} == set(families.families())
