"""Checkpoints that are damaged, of another kind, or not to be trusted: one clear message, and nothing is written."""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from farspan.errors import CheckpointError
from farspan.models.convert import convert, families, writer
from tests.models.tiny_families import TINY, published_checkpoint, save_published, tiny_model

INDEX = "model.safetensors.index.json"


class Trap:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trap-was-sprung",)


@dataclass
class Case:
    """A mistake in a tiny MetaLA checkpoint, the message that it gets, and what is asked for."""

    mistake: Callable[[Path, dict[str, Tensor]], object]
    message: str
    arguments: dict[str, Any]


def case(mistake: Callable[[Path, dict[str, Tensor]], object], message: str, **arguments: Any) -> Case:
    return Case(mistake, message, arguments)


def write(name: str, content: str) -> Callable[[Path, dict[str, Tensor]], object]:
    return lambda source, state: (source / name).write_text(content)


def configure(**changes: Any) -> Callable[[Path, dict[str, Tensor]], object]:
    def mistake(source: Path, state: dict[str, Tensor]) -> None:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return mistake


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, dict[str, Tensor]], object]:
    """Saves other tensors."""

    def mistake(source: Path, state: dict[str, Tensor]) -> None:
        change(state)
        save_file({name: x.contiguous() for name, x in state.items()}, source / "model.safetensors")

    return mistake


def cut(name: str, keep: float) -> Callable[[Path, dict[str, Tensor]], object]:
    """Keeps a part of a file."""

    def mistake(source: Path, state: dict[str, Tensor]) -> None:
        content = (source / name).read_bytes()
        (source / name).write_bytes(content[: int(len(content) * keep)])

    return mistake


def pickled(make: Callable[[dict[str, Tensor]], Any], **options: Any) -> Callable[[Path, dict[str, Tensor]], object]:
    """Puts a file of torch.save in the place of the weights."""

    def mistake(source: Path, state: dict[str, Tensor]) -> None:
        (source / "model.safetensors").unlink()
        torch.save(make(state), source / "pytorch_model.bin", **options)

    return mistake


def sharded(change: Callable[[dict[str, str]], object]) -> Callable[[Path, dict[str, Tensor]], object]:
    """Makes two shards with an index, and changes the index."""

    def mistake(source: Path, state: dict[str, Tensor]) -> None:
        (source / "model.safetensors").unlink()
        names = sorted(state)
        listed = {}
        for file, held in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
            save_file({name: state[name] for name in held}, source / file)
            listed |= dict.fromkeys(held, file)
        change(listed)
        (source / INDEX).write_text(json.dumps({"weight_map": listed}))

    return mistake


def both(*mistakes: Callable[[Path, dict[str, Tensor]], object]) -> Callable[[Path, dict[str, Tensor]], object]:
    return lambda source, state: [mistake(source, state) for mistake in mistakes]


EMBEDDING, GATE = "model.embed_tokens.weight", "model.layers.1.token_mixer.k_gate.weight"


def gpt2(state: dict[str, Tensor]) -> None:
    state.clear()
    state |= {f"h.{i}.attn.c_attn.weight": torch.zeros(4, 12) for i in range(7)}


CASES = {
    # the file
    "no such directory": case(lambda source, _: shutil.rmtree(source), "source does not exist; give the directory"),
    "no weights": case(lambda source, _: (source / "model.safetensors").unlink(), "has no weights; expected model.saf"),
    "several files": case(
        both(
            lambda source, state: (source / "model.safetensors").rename(source / "a.safetensors"),
            lambda source, state: shutil.copy(source / "a.safetensors", source / "b.safetensors"),
        ),
        "2 files that may be the weights (a.safetensors, b.safetensors), and no index",
    ),
    "truncated": case(
        cut("model.safetensors", 0.7),
        "model.safetensors (",
    ),
    "truncated header": case(cut("model.safetensors", 0.005), "is cut off or damaged: "),
    "empty": case(write("model.safetensors", ""), "(0 bytes) is cut off or damaged"),
    "not safetensors": case(write("model.safetensors", "<html>not found</html>"), "is cut off or damaged"),
    "a pointer": case(
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`",
    ),
    "truncated bin": case(both(pickled(dict), cut("pytorch_model.bin", 0.7)), "cut off, damaged, or no file of torch"),
    "truncated old bin": case(
        both(pickled(dict, _use_new_zipfile_serialization=False), cut("pytorch_model.bin", 0.7)),
        "cut off, damaged, or no file of torch",
    ),
    "pickled code": case(pickled(lambda state: state | {"x": Trap()}), "holds pickled code (posix.mkdir)"),
    "pickled code in an old file": case(
        pickled(lambda state: state | {"x": Trap()}, _use_new_zipfile_serialization=False),
        "which would run if it were loaded; it is refused",
    ),
    "a list": case(pickled(lambda state: [*state.values()]), "holds no state dict; expected a dict of tensors"),
    "other things": case(pickled(lambda state: state | {"step": 3}), "holds other things than tensors (step)"),
    "sparse": case(
        pickled(lambda state: {"x": torch.eye(3).to_sparse()}), "is sparse or quantised; only plain tensors"
    ),
    # the index
    "path to the outside": case(
        sharded(lambda listed: listed.update({GATE: "../b.safetensors"})), "'../b.safetensors', outside"
    ),
    "hidden path to the outside": case(
        sharded(lambda listed: listed.update({GATE: "x/../../b.safetensors"})),
        "outside of its directory or not a plain",
    ),
    "absolute path": case(
        sharded(lambda listed: listed.update({GATE: "/etc/b.safetensors"})), "'/etc/b.safetensors', outs"
    ),
    "missing shard": case(
        sharded(lambda listed: listed.update({GATE: "c.safetensors"})),
        "is incomplete: 1 of 3 files that model.safetensors.index.json lists are missing (c.safetensors)",
    ),
    "tensor that no shard has": case(
        sharded(lambda listed: listed.update({"x": "b.safetensors"})),
        "b.safetensors and its index do not agree: 1 tensors are missing in the file (x)",
    ),
    "tensor that the index has not": case(
        sharded(lambda listed: listed.pop(GATE)), f"do not agree: 1 tensors are not in the index ({GATE})"
    ),
    "truncated shard": case(
        both(sharded(dict), cut("b.safetensors", 0.8)),
        "b.safetensors (",
    ),
    "index without a map": case(both(sharded(dict), write(INDEX, "{}")), "is damaged: it has no weight_map"),
    "damaged index": case(both(sharded(dict), write(INDEX, "{'")), f"{INDEX} is damaged: Expecting"),
    # the configuration
    "damaged config": case(write("config.json", "{'"), "config.json is damaged: Expecting"),
    "config that is a list": case(write("config.json", "[]"), "config.json is damaged: it holds no JSON object"),
    "config of other weights": case(
        configure(decoder_embed_dim=64), f"{EMBEDDING} in model.safetensors has shape [61, 32]; MetaLA"
    ),
    "config with more layers": case(configure(decoder_layers=3), "(--family metala): 11 missing (model.layers.2"),
    "config with fewer layers": case(configure(decoder_layers=1), "(--family metala): 11 not known (model.layers.1"),
    "config that Farspan refuses": case(
        configure(decoder_attention_heads=3), "is not divisible by num_attention_heads=3"
    ),
    "config that makes no sense": case(configure(decoder_embed_dim="wide"), "cannot be read as MetaLA"),
    "unknown activation": case(configure(glu_act="mish"), "config.json has glu_act='mish', which cannot be converted"),
    # the tensors
    "no tensors": case(tensors(lambda state: state.clear()), "source holds no tensors"),
    "a tensor is missing": case(tensors(lambda state: state.pop(GATE)), f"1 missing ({GATE})."),
    "a tensor too many": case(
        tensors(lambda state: state.update(lora=torch.zeros(1))), "(--family metala): 1 not known (lora)."
    ),
    "a tensor under two names": case(
        tensors(lambda state: state.update({"LayerNorm.gamma": torch.ones(1), "LayerNorm.weight": torch.ones(1)})),
        "has tensors under their old and their new names: LayerNorm.",
    ),
    "integers": case(
        tensors(lambda state: state.update({GATE: state[GATE].to(torch.int8)})),
        f"{GATE} in model.safetensors is int8, as 1 parameters are; accepted: float16",
    ),
    "complex": case(pickled(lambda state: state | {GATE: state[GATE].to(torch.complex64)}), "is complex64, as 1"),
    "eight bits": case(
        tensors(lambda state: state.update({GATE: state[GATE].to(torch.float8_e4m3fn)})), "is F8_E4M3, as 1 parameters"
    ),
    "another shape": case(
        tensors(lambda state: state.update({GATE: state[GATE][:-1]})), f"{GATE} in model.safetensors has shape [15, 32]"
    ),
    "an unknown model": case(tensors(gpt2), "No known family has such parameters (h.0.attn.c_attn.weight, "),
    "nearly a known one": case(
        tensors(lambda state: state.update({"x": state.pop("model.layers.0.token_mixer.k_gate.weight")})),
        "Nearest: These are not the tensors of MetaLA (Hugging Face style) (--family metala): 1 missing (model.",
    ),
    "another family": case(
        lambda source, state: None,
        "cannot be read as MetaLA (GPT-NeoX style) (--family metala-neox): 'sequential.0.word_embeddings.weight' is "
        "missing among its parameters. It looks like MetaLA (Hugging Face style) (--family metala).",
        family="metala-neox",
    ),
    "an unknown model taken for a known one": case(
        tensors(lambda state: [state.pop(name) for name in list(state) if "k_gate" in name]),
        "These are not the tensors of MetaLA (Hugging Face style) (--family metala): 2 missing (model.layers.0.",
        family="metala",
    ),
    "an unknown model without the first parameter": case(
        tensors(gpt2),
        "cannot be read as MetaLA (Hugging Face style) (--family metala): 'model.embed_tokens.weight' is missing among",
        family="metala",
    ),
    "a later form of the same names": case(
        configure(norm_type="layernorm"),
        "10 missing (model.final_norm.bias, model.final_norm.weight, model.layers.0.ch",
    ),
    "an unknown family": case(
        lambda source, state: None, "Unknown family 'metalla': did you mean 'metala'", family="metalla"
    ),
    # what is asked for
    "no Farspan model": case(lambda source, state: None, "is no Farspan model (model_type is 'metala')", to="original"),
    "no direction": case(lambda source, state: None, "to='back' is no direction", to="back"),
    "no type": case(lambda source, state: None, "dtype=int8 is not accepted", dtype=torch.int8),
    "no size": case(lambda source, state: None, "max_shard_size='huge' is no size", max_shard_size="huge"),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, config, state = published_checkpoint("metala")
    source = save_published(tmp_path / "source", config, state)
    CASES[name].mistake(source, state)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as failed:
        convert(source, tmp_path / "ours", **CASES[name].arguments)
    message = str(failed.value)
    assert CASES[name].message in message
    assert "\n" not in message and len(message) < 700 + len(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", sorted(TINY))
def test_no_tensor_may_be_missing(name: str, tmp_path: Path) -> None:
    """Unless it repeats or follows from others, or its absence tells of another configuration, such as a tied head."""
    _, config, state = published_checkpoint(name)
    source = save_published(tmp_path / "source", config, state)
    whole = convert(source, dry_run=True)
    refused = 0
    for missing in state:
        save_published(source, config, {key: x for key, x in state.items() if key != missing})
        try:
            done = convert(source, dry_run=True)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert missing in (*whole.copies, *whole.derived) or done.config != whole.config
    assert refused > 0.9 * len(whole.rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_settings_of_any_value_are_understood_or_refused(name: str, tmp_path: Path) -> None:
    """Anything but a `CheckpointError` fails here."""
    _, config, state = published_checkpoint(name)
    source = save_published(tmp_path / "source", config, state)
    refused = 0
    for field, value in itertools.product(config, (..., None, "x", -1, 0, 1e9, True, [], {})):
        changed = config | {field: value}
        if value is ...:
            del changed[field]
        (source / "config.json").write_text(json.dumps(changed))
        try:
            convert(source, dry_run=True)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused


def test_what_the_configuration_alone_can_tell_is_asked_for(tmp_path: Path) -> None:
    _, config, state = published_checkpoint("longnet-decoder")
    source = save_published(tmp_path / "source", config, state)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match="could be longnet-decoder, longnet-encoder; name one with --family"):
        convert(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="segment_length and dilated_ratio"):
        convert(source, tmp_path / "ours", family="longnet-decoder")


def _converted(tmp_path: Path) -> Path:
    _, config, state = published_checkpoint("metala")
    source = save_published(tmp_path / "source", config, state)
    convert(source, tmp_path / "ours")
    return source


def test_destinations_that_are_taken(tmp_path: Path) -> None:
    source = _converted(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    for destination, words in (
        ("ours", "ours exists; choose another place, or replace it with --overwrite"),
        ("work", "exists and is no model directory; it is left alone"),
        ("file", "exists and is no model directory; it is left alone"),
        ("source", "is, holds, or lies in the checkpoint"),
        ("source/ours", "is, holds, or lies in the checkpoint"),
        (".", "is, holds, or lies in the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert(source, tmp_path / destination, overwrite=destination != "ours")
    assert (tmp_path / "work" / "thesis.tex").exists()
    with pytest.raises(CheckpointError, match="There is no destination"):
        convert(source)
    with pytest.raises(CheckpointError, match="is a Farspan model already"):
        convert(tmp_path / "ours", tmp_path / "again")
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    convert(source, tmp_path / "deep" / "er" / "place")


def _fail(stop: BaseException) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == 7:
            raise stop

    return progress


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_is_not_complete_is_not_there(stop: BaseException, tmp_path: Path) -> None:
    source = _converted(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for destination in ("ours", "new"):
        with pytest.raises(type(stop)):
            convert(source, tmp_path / destination, overwrite=True, progress=_fail(stop))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwriting_replaces_all(tmp_path: Path) -> None:
    source = _converted(tmp_path)
    (tmp_path / "ours" / "old.txt").write_text("x")
    convert(source, tmp_path / "ours", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]
    assert not (tmp_path / "ours" / "old.txt").exists()


def test_a_failed_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _converted(tmp_path)
    replace = os.replace

    def failing(old: Path, new: Path) -> None:
        if old.name == ".ours.converting":
            raise OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(writer.os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        convert(source, tmp_path / "ours", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]
    assert (tmp_path / "ours" / "model.safetensors").exists()


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    source = _converted(tmp_path)
    (tmp_path / ".new.converting" / "deep").mkdir(parents=True)
    (tmp_path / ".new.converting" / "model.safetensors").write_text("half")
    (tmp_path / "ours").rename(tmp_path / ".new.replaced")  # killed between its two renames
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", progress=_fail(KeyboardInterrupt()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]
    convert(tmp_path / "new", tmp_path / "back", to="original")


def test_two_processes_do_not_write_one_destination(tmp_path: Path) -> None:
    source = _converted(tmp_path)
    (tmp_path / ".new.converting").mkdir()
    descriptor = os.open(tmp_path / ".new.converting", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is writing"):
        convert(source, tmp_path / "new")
    os.close(descriptor)
    convert(source, tmp_path / "new")


def test_too_little_room_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _converted(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100))
    with pytest.raises(OSError, match="bytes are needed and 100 are free"):
        convert(source, tmp_path / "new")


def test_a_disk_that_does_not_keep_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _converted(tmp_path)
    close = writer.ShardWriter.close

    def losing(self: writer.ShardWriter) -> None:
        close(self)
        path = next((tmp_path / ".new.converting").glob("model*.safetensors"))
        path.write_bytes(path.read_bytes()[:-4])

    monkeypatch.setattr(writer.ShardWriter, "close", losing)
    with pytest.raises(CheckpointError, match="is cut off or damaged"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda ours: (ours / "conversion.json").write_text("{"), "conversion.json is damaged"),
        (lambda ours: (ours / "conversion.json").write_text('{"family": 3}'), "conversion.json is damaged"),
        (lambda ours: (ours / "config.json").unlink(), "model_type is None"),
        (
            lambda ours: (ours / "config.json").write_text('{"model_type": "farspan", "hiden_size": 3}'),
            "is not accepted: Unknown config field 'hiden_size'",
        ),
        (
            lambda ours: (ours / "config.json").write_text(
                '{"model_type": "farspan", "architectures": ["FarspanConfig"]}'
            ),
            "architectures=\\['FarspanConfig'\\], of which Farspan knows none",
        ),
        (
            lambda ours: (ours / "config.json").write_text('{"model_type": "farspan", "num_hidden_layers": 1}'),
            r"not the tensors of the FarspanForCausalLM that config.json describes: \d+ missing",
        ),
    ],
)
def test_mistakes_on_the_way_back(mistake: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    _converted(tmp_path)
    mistake(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "ours", tmp_path / "back", to="original")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["bert", "cottention-gpt", "longnet-decoder", "longvit", "llama", "metala"])
def test_a_model_goes_out_in_forms_that_can_express_it_alone(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=f"name the form to write with --family. It fits {name}\\."):
        convert(tmp_path / "ours", to="original", dry_run=True)
    expressing = set()
    for family in families.families():
        try:
            convert(tmp_path / "ours", to="original", family=family, dry_run=True)
            expressing.add(family)
        except CheckpointError as error:
            assert "\n" not in str(error)
    # Cottention's two variants are written alike: the mixers tell which it is.
    assert expressing == {"bert": {"bert", "cottention-bert"}, "cottention-gpt": {"gptj", "cottention-gpt"}}.get(
        name, {name}
    )
