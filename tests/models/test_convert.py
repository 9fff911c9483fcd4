"""Converting checkpoints: every family both ways to the bit, and every form in which one may lie on the disk."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import farspan.models
from farspan.errors import CheckpointError
from farspan.models.convert import convert, families
from farspan.models.convert.plan_out import differences
from tests.models.tiny_families import TINY, family_of, published_checkpoint, save_published, tiny_model


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in wanted.items()
    )


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def published(case: str, directory: Path, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    """A saved checkpoint with fields of its configuration changed, and its tensors."""
    _, written, state = published_checkpoint(case)
    return save_published(directory / "source", written | config, state), state


def back(directory: Path, **arguments: Any) -> dict[str, Tensor]:
    """What the way back makes of the converted model in `directory`."""
    convert(directory / "ours", directory / "back", to="original", **arguments)
    return load_file(directory / "back" / "model.safetensors")


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
    assert loaded.dtype == torch.bfloat16 and not differences(loaded.config, model.config)
    assert same(loaded.state_dict(), model.state_dict())
    assert same(back(tmp_path), state)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert config_of(tmp_path / "back") == json.loads(json.dumps(config))


def test_every_family_is_in_the_table() -> None:
    assert {family_of(case).name for case in TINY} == set(families.families())


def test_the_page_has_every_family() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "converting.md"
    rows = page.read_text(encoding="utf-8").split("## Families")[1].split("## Traps")[0]
    assert set(re.findall(r"^\| `(\w[\w-]*)` \|", rows, re.M)) == set(families.families())


def test_a_language_model_says_the_same_after_conversion(tmp_path: Path) -> None:
    source, _ = published("cottention-gpt", tmp_path)
    convert(source, tmp_path / "ours")
    ids = torch.randint(0, 61, (2, 9))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny_model("cottention-gpt")(ids).logits)


def _sharded(source: Path, state: dict[str, Tensor]) -> None:
    names = sorted(state)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, source / file, metadata={"format": "pt"})
    listed = {name: file for file, held in parts.items() for name in held}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def _sharded_bin(source: Path, state: dict[str, Tensor]) -> None:
    names = sorted(state)
    listed = {}
    for i in range(2):
        torch.save({name: state[name] for name in names[i::2]}, source / f"part-{i}.bin")
        listed |= dict.fromkeys(names[i::2], f"part-{i}.bin")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))


FORMS: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "safetensors shards": _sharded,
    "bin": lambda source, state: torch.save(state, source / "pytorch_model.bin"),
    "bin of torch before 1.6": lambda source, state: torch.save(
        state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "bin shards": _sharded_bin,
    "another name": lambda source, state: torch.save(state, source / "weights.pth"),
    "inside of a training state": lambda source, state: torch.save(
        {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, source / "checkpoint.pt"
    ),
    "beside an optimizer": lambda source, state: [
        torch.save({name: torch.nn.Parameter(x) for name, x in state.items()}, source / "weights.bin"),
        torch.save({"state": 1}, source / "optimizer.pt"),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_on_the_disk(form: str, tmp_path: Path) -> None:
    source, state = published("gptj", tmp_path)
    (source / "model.safetensors").unlink()
    FORMS[form](source, state)
    convert(source, tmp_path / "ours")
    assert same(back(tmp_path), state)


def test_one_file_as_the_source(tmp_path: Path) -> None:
    source, state = published("metala", tmp_path)
    convert(source / "model.safetensors", tmp_path / "ours")
    assert same(back(tmp_path), state)


def test_settings_beside_the_weights_stand_in_for_a_missing_config(tmp_path: Path) -> None:
    """As in checkpoints of fairseq: a Namespace of arguments and the model, in one file."""
    _, config, state = published_checkpoint("longnet-decoder")
    torch.save({"model": state, "args": argparse.Namespace(**config, device=torch.device("cpu"))}, tmp_path / "last.pt")
    done = convert(tmp_path / "last.pt", tmp_path / "ours")
    assert "the settings in last.pt" in done.notes[0]
    assert same(back(tmp_path), state)
    assert config_of(tmp_path / "back").items() >= json.loads(json.dumps(config)).items()


def test_without_config_what_was_assumed_is_said(tmp_path: Path) -> None:
    source, state = published("metala", tmp_path)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match="It looks like MetaLA"):
        convert(source, family="longnet-decoder", dry_run=True)
    done = convert(source, tmp_path / "ours")
    assert done.config_from is None and done.assumed["decoder_attention_heads"] == 8
    assert "no config.json; assumed: " in done.notes[0] and "decoder_attention_heads=8" in done.notes[0]
    assert same(back(tmp_path), state)


def test_a_family_that_is_named_wins_over_what_the_checkpoint_looks_like(tmp_path: Path) -> None:
    """CoCA's GPT-NeoX, saved again by the stock class, has nothing left that tells it from a stock model."""
    _, config, state = published_checkpoint("coca-neox")
    state = {name: x for name, x in state.items() if "inv_freq" not in name}
    del config["attention_type"]
    source = save_published(tmp_path / "source", config, state)
    assert convert(source, dry_run=True).family == "gpt_neox"
    done = convert(source, tmp_path / "ours", family="coca-neox")
    assert set(done.config["mixers"]) == {"collinear"}
    assert "It looks like GPT-NeoX (--family gpt_neox). It is converted as CoCA on GPT-NeoX, as" in done.notes[0]
    assert same(back(tmp_path), state)


def test_shards_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    source, state = published("bert", tmp_path)
    convert(source, tmp_path / "ours", max_shard_size=20_000)
    model = farspan.models.FarspanForMaskedLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "saved", max_shard_size=20_000)
    files = {path.name for path in (tmp_path / "ours").iterdir()} - {"conversion.json"}
    assert files == {path.name for path in (tmp_path / "saved").iterdir()}
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == theirs["metadata"] and index["weight_map"].keys() == theirs["weight_map"].keys()
    assert len(files) > 4
    assert same(back(tmp_path), state)


def test_a_head_that_is_not_the_embedding_is_kept(tmp_path: Path) -> None:
    for case, head in (("gptj/tied", "lm_head.weight"), ("bert", "cls.predictions.decoder.weight")):
        place = tmp_path / head
        source, state = published(case, place)
        state[head] = state[head] + 1
        save_published(source, config_of(source), state)
        done = convert(source, place / "ours")
        assert f"{head} is not the embedding" in done.notes[-1] and head not in done.copies
        loaded = getattr(farspan.models, done.architecture).from_pretrained(place / "ours")
        assert torch.equal(loaded.lm_head.weight, state[head])
        assert done.parameters == sum(parameter.numel() for parameter in loaded.parameters())
        assert same(back(place), state)


def test_a_bias_that_should_be_a_copy_and_is_not_is_refused(tmp_path: Path) -> None:
    source, state = published("bert", tmp_path)
    state["cls.predictions.decoder.bias"] = state["cls.predictions.decoder.bias"] + 1
    save_published(source, config_of(source), state)
    with pytest.raises(CheckpointError, match=r"decoder\.bias should repeat cls\.predictions\.bias, but it differs"):
        convert(source, dry_run=True)


def test_copies_and_buffers_come_back_as_they_were(tmp_path: Path) -> None:
    source, state = published("longnet-decoder", tmp_path / "a")
    scales = [name for name in state if name.endswith("xpos.scale")]
    state[scales[0]] = state[scales[0]].half()
    del state[scales[1]]
    save_published(source, config_of(source), state)
    done = convert(source, tmp_path / "a" / "ours")
    assert done.derived == scales[:1]
    assert same(back(tmp_path / "a"), state)
    narrow = back(tmp_path / "a", dtype=torch.bfloat16, overwrite=True)
    kinds = {name: torch.float16 if name == scales[0] else torch.bfloat16 for name in state}  # a buffer stays as it was
    assert {name: x.dtype for name, x in narrow.items()} == kinds

    source, state = published("bert", tmp_path / "b")
    del state["cls.predictions.decoder.weight"]
    save_published(source, config_of(source), state | {"bert.embeddings.position_ids": torch.arange(64)[None]})
    done = convert(source, tmp_path / "b" / "ours")
    assert done.copies == ["cls.predictions.decoder.bias"] and done.ignored == ["bert.embeddings.position_ids"]
    assert same(back(tmp_path / "b"), state)  # what is ignored means nothing, and is not written again


def test_a_buffer_of_another_configuration_is_reported(tmp_path: Path) -> None:
    source, state = published("longnet-decoder", tmp_path)
    name = next(name for name in state if name.endswith("xpos.scale"))
    save_published(source, config_of(source), state | {name: state[name] * 2})
    assert f"The buffer {name} is not what config.json says" in convert(source, dry_run=True).notes[0]


def test_old_names_come_back(tmp_path: Path) -> None:
    source, state = published("bert", tmp_path)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in state.items()}
    assert old.keys() != state.keys()
    save_published(source, config_of(source), old)
    convert(source, tmp_path / "ours")
    assert same(back(tmp_path), old)


def test_types_are_kept_or_changed(tmp_path: Path) -> None:
    source, state = published("metala", tmp_path, torch_dtype="float16")
    state = {name: x if x.dim() == 1 else x.half() for name, x in state.items()}
    save_published(source, config_of(source), state)
    done = convert(source, tmp_path / "ours")
    assert done.dtype == "float16" and "several types (float16, float32), which are kept" in done.notes[-1]
    assert same(back(tmp_path), state)
    assert config_of(tmp_path / "back")["torch_dtype"] == "float16"

    convert(source, tmp_path / "wide", dtype=torch.float64)
    assert {x.dtype for x in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float64}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float64
    convert(tmp_path / "wide", tmp_path / "wide-back", to="original")
    assert config_of(tmp_path / "wide-back")["torch_dtype"] == "float64"
    convert(tmp_path / "wide", tmp_path / "wide-back", to="original", dtype=torch.bfloat16, overwrite=True)
    assert config_of(tmp_path / "wide-back")["torch_dtype"] == "bfloat16"

    state["model.embed_tokens.weight"] = torch.full((61, 32), 1e5)
    save_published(source, config_of(source), state)
    with pytest.raises(CheckpointError, match="values that float16 cannot hold"):
        convert(source, tmp_path / "narrow", dtype=torch.float16)
    assert not (tmp_path / "narrow").exists()


def test_what_goes_along(tmp_path: Path) -> None:
    source, _ = published("metala", tmp_path)
    along = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja", "spiece.model", "LICENSE")
    for name in (*along, "generation_config.json"):
        (source / name).write_text("{}")
    for name in ("modeling_metala.py", "train.sh", "notes.json"):
        (source / name).write_text("{}")
    torch.save([1], source / "pickled.model")
    done = convert(source, tmp_path / "ours")
    assert done.files == sorted([*along, "generation_config.json"])
    assert "none of it: modeling_metala.py." in done.notes[-1]
    convert(tmp_path / "ours", tmp_path / "back", to="original")
    assert all((tmp_path / "back" / name).read_text() == "{}" for name in done.files)
    assert not list(tmp_path.glob("*/*.py"))[1:] and not (tmp_path / "ours" / "pickled.model").exists()
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokens.Own", null]}}')
    assert "tokenizer is code of its own" in convert(source, dry_run=True).notes[-1]


def test_a_negative_token_is_none_and_comes_back(tmp_path: Path) -> None:
    source, _ = published("llama", tmp_path, pad_token_id=-1)
    assert convert(source, tmp_path / "ours").config["pad_token_id"] is None
    back(tmp_path)
    assert config_of(tmp_path / "back")["pad_token_id"] == -1


def test_a_trained_model_goes_back_with_its_changes(tmp_path: Path) -> None:
    source, state = published("gptj", tmp_path, some_note="kept")
    convert(source, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.config.eos_token_id = 7
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "ours")
    after = back(tmp_path)
    changed = [name for name, x in state.items() if not torch.equal(after[name], x)]
    assert changed == ["lm_head.weight"]
    config = config_of(tmp_path / "back")
    assert config["eos_token_id"] == 7 and config["some_note"] == "kept"


def test_a_model_that_was_never_converted_goes_out_if_a_family_can_say_it(tmp_path: Path) -> None:
    model = tiny_model("metala")
    model.config.hidden_dropout = 0.1
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"name the form to write with --family\. It fits metala"):
        back(tmp_path)
    notes = convert(tmp_path / "ours", to="original", family="metala", dry_run=True).notes
    assert "has no hidden_dropout: left out, which matters in training alone" in notes[0]
    with pytest.raises(CheckpointError, match="has no place for"):
        back(tmp_path, family="gptj")
    back(tmp_path, family="metala")
    convert(tmp_path / "back", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same(again.state_dict(), model.state_dict())

    model.config.norm_eps = 0.5
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"this model: norm_eps is 0\.5 and would be 1e-06\."):
        back(tmp_path, family="metala", overwrite=True)
