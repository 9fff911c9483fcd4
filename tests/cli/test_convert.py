"""`farspan convert`: what it prints, what it leaves on the disk, and how it fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from farspan.cli.convert import collapsed
from farspan.cli.main import main
from tests.models.tiny_families import published_checkpoint, save_published


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Cottention's BERT, which claims to be a BERT."""
    _, config, state = published_checkpoint("cottention-bert")
    return save_published(tmp_path / "cottention", config, state)


def test_there_and_back(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", str(checkpoint), ours]) == 0
    said = capsys.readouterr()
    assert "family   Cottention BERT (cosine attention), as FarspanForMaskedLM" in said.out
    assert "tensors  48, 21,447 parameters, 85,788 bytes, float32" in said.out
    assert f"written  {ours}\nnext     farspan info {ours}\n" in said.out
    assert "note: This checkpoint says that it is a BERT. The stock class would drop norm_const" in said.err
    assert main(["info", ours]) == 0

    assert main(["convert", ours, back, "--to", "original"]) == 0
    said = capsys.readouterr()
    assert "as BertForPreTraining" in said.out and not said.err
    before, after = (load_file(Path(place) / "model.safetensors") for place in (checkpoint, back))
    assert before.keys() == after.keys() and all(equal(after[name], before[name]) for name in before)


def test_a_dry_run_shows_all_and_writes_nothing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(checkpoint.parent.rglob("*"))
    assert main(["convert", str(checkpoint), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert sorted(checkpoint.parent.rglob("*")) == before
    lines = [line.split() for line in said.out.splitlines()]
    assert (
        "bert.encoder.layer.{0–1}.attention.self.norm_const 1 × 4 × 1 × 1 model.layers.{0–1}.mixer.length_exponent"
        in (" ".join(line) for line in lines)
    )
    assert '"attention_type": "cos"' in said.out and '"mixers": ["cosine", "cosine"]' in said.out
    assert "copies of another tensor\n  cls.predictions.decoder.bias, cls.predictions.decoder.weight\n" in said.out
    assert "written  nothing (dry run)" in said.out
    assert "This checkpoint says that it is a BERT" in said.err


def test_json_has_every_tensor(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(checkpoint), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["destination"] is None and planned["family"] == "cottention-bert"
    assert len(planned["rows"]) == planned["tensors"] == 48
    assert ["cls.predictions.bias", [61], ["lm_head.bias"]] in planned["rows"]
    assert main(["convert", str(checkpoint), str(tmp_path / "ours"), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["destination"] == str(tmp_path / "ours")
    assert {name for name in planned if planned[name] != done[name]} <= {"destination", "seconds"}


def test_options(checkpoint: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    assert main(["convert", str(checkpoint), str(ours), "--dtype", "bfloat16", "--max-shard-size", "10KB"]) == 0
    assert len(list(ours.glob("model-*.safetensors"))) > 3
    assert json.loads((ours / "config.json").read_text())["dtype"] == "bfloat16"
    assert main(["convert", str(checkpoint), str(ours)]) == 2
    assert main(["convert", str(checkpoint), str(ours), "--overwrite", "--family", "cottention-bert"]) == 0
    assert json.loads((ours / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["SRC"], "farspan convert needs DST, the directory to make; or --dry-run"),
        (["nowhere", "DST"], "nowhere does not exist"),
        (["SRC", "DST", "--family", "bertt"], "Unknown family 'bertt': did you mean 'bert'? Accepted: "),
        (["SRC", "DST", "--family", "metala"], "It looks like Cottention BERT (cosine attention)"),
        (["SRC", "SRC", "--overwrite"], "lies in the checkpoint"),
        (["SRC", "DST", "--to", "original"], "is no Farspan model (model_type is 'bert'); leave out --to original"),
        (["SRC", "DST", "--max-shard-size", "0.x"], "max_shard_size='0.x' is no size"),
    ],
)
def test_mistakes(
    arguments: list[str], words: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"SRC": str(checkpoint), "DST": str(tmp_path / "ours")}
    assert main(["convert", *(places.get(word, word) for word in arguments)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and words in said.err and said.err.count("\n") == 1
    assert not said.out and [path.name for path in tmp_path.iterdir()] == ["cottention"]


def test_a_full_disk(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("farspan.models.convert.writer.os.fsync", full)
    assert main(["convert", str(checkpoint), str(tmp_path / "ours")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cottention"]


@pytest.mark.slow
def test_an_interrupted_conversion_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C while tensors are written, which here takes long."""
    code = (
        "import sys, time; from farspan.cli.main import main; from farspan.models.convert.writer import ShardWriter;"
        "ShardWriter.write = lambda *given: time.sleep(60); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", str(checkpoint), str(tmp_path / "ours")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    staging = tmp_path / ".ours.converting"
    until = time.monotonic() + 60
    while not any(staging.glob("*.safetensors")) and time.monotonic() < until:
        time.sleep(0.05)
    assert any(staging.glob("*.safetensors"))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cottention"]


def test_layers_are_collapsed() -> None:
    rows = [("wte", [3], ["embed"])]
    rows += [(f"seq.{i + 2}.w", [4, 4], [f"layers.{i}.q.2", f"layers.{i}.k.2"]) for i in range(3)]
    rows += [("seq.5.norm", [4], ["norm"])]
    assert collapsed(rows) == [
        ("wte", "3", "embed"),
        ("seq.{2–4}.w", "4 × 4", "layers.{0–2}.q.2, layers.{0–2}.k.2"),
        ("seq.5.norm", "4", "norm"),
    ]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: farspan convert" in said and "--to original" in said and "Pickled code is refused" in said
