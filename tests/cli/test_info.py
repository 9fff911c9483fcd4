"""`farspan info`."""

import json
import re
from pathlib import Path

import pytest
import torch

from farspan.cli.info import _bytes, _ranges, count_parameters, describe_machine
from farspan.cli.main import main
from farspan.errors import CheckpointError
from farspan.evaluation.loading import load_model
from farspan.mixers.softmax import SoftmaxMixer
from farspan.models import FarspanConfig, FarspanForCausalLM, FarspanForMaskedLM


def found(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main(["info", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_machine(capsys: pytest.CaptureFixture[str]) -> None:
    machine = found(capsys)
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["cpu"]["cores"] >= 1
    assert machine["operators"]["metala_attention"]["reference"] is None  # nothing speaks against it
    if not torch.cuda.is_available():
        assert all(backends["triton"] for backends in machine["operators"].values())  # each with its reason
    assert machine["mixers"]["metala"]["cache"] == "state"
    for mixer in machine["mixers"].values():
        assert set(mixer["operators"]) <= set(machine["operators"])
        assert bool(mixer["backends"]) == bool(mixer["operators"])
    assert machine["mixers"]["softmax"]["cache"] == "kv"
    assert "gated_mlp" in machine["feed_forwards"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*machine["operators"], *machine["mixers"], *machine["feed_forwards"]])
    for name in {name for mixer in machine["mixers"].values() for name in mixer["operators"]}:
        users = sum(name in mixer["operators"] for mixer in machine["mixers"].values())
        assert len(re.findall(rf"\b{name}\b", text)) == 1 + users, f"{name} is cut, or left out"


def test_a_mixer_needs_the_backends_of_all_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan import ops

    backends = {"reference": None, "torch": None, "triton": None}
    availability = {"one": backends, "other": {**backends, "triton": "no kernels"}}
    monkeypatch.setattr(ops, "availability", lambda: availability)
    monkeypatch.setattr(SoftmaxMixer, "operators", ("one", "other"), raising=False)
    mixer = describe_machine()["mixers"]["softmax"]
    assert mixer["operators"] == ["one", "other"]
    assert mixer["backends"] == {"reference": None, "torch": None, "triton": "no kernels"}


def test_model_directory(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = found(capsys, str(tiny_run))
    run = json.loads((tiny_run / "run.json").read_text())
    assert model["parameters"]["total"] == run["parameters"] == sum(model["parameters"].values()) / 2
    assert model["layers"] == [{"mixer": "metala", "cache": "linear_attention", "feed_forward": "gated_mlp"}]
    assert len(set(model["cache_bytes"].values())) == 1  # a state does not grow
    assert model["trained_length"] == 32
    assert model["trained_on"]["corpus"]["fingerprint"] == run["corpus"]["fingerprint"]
    assert main(["info", str(tiny_run)]) == 0
    assert f"total {run['parameters']:,}" in capsys.readouterr().out


def test_a_model_that_writes_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "mixers": ["cosine"], "causal": False}
    model = FarspanForMaskedLM(FarspanConfig(**sizes, num_hidden_layers=2, pooler=True))
    model.save_pretrained(tmp_path)
    described = found(capsys, str(tmp_path))
    assert described["architecture"] == "FarspanForMaskedLM"
    assert described["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert set(described["cache_bytes"].values()) == {None}
    assert all(flops > 0 for flops in described["flops_per_token"].values())
    assert main(["info", str(tmp_path)]) == 0
    assert "writes no text" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="FarspanForMaskedLM, which writes no text"):
        load_model(tmp_path)


def test_an_unknown_architecture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = FarspanConfig(vocab_size=50, hidden_size=16, num_attention_heads=2)
    FarspanForCausalLM(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "architectures": ["FarspanForMasked"]}))
    assert main(["info", str(tmp_path)]) == 2
    assert "FarspanForMaskedLM" in capsys.readouterr().err


def test_a_tied_head_counts_once() -> None:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "mixers": ["softmax"],
    }
    with torch.device("meta"):
        tied, free = (FarspanForCausalLM(FarspanConfig(**sizes, tie_word_embeddings=tied)) for tied in (True, False))
    assert "head" not in count_parameters(tied)
    assert count_parameters(free)["head"] == 50 * 16
    assert count_parameters(free)["total"] == sum(p.numel() for p in free.parameters())


def test_numbers_are_written_for_people() -> None:
    assert _ranges([0, 1, 2, 4, 6, 7]) == "0–2, 4, 6–7"
    assert _bytes(10) == "10 bytes"
    assert _bytes(1536) == "1.5 KiB"
    assert _bytes(3 * 2**40) == "3.0 TiB"
