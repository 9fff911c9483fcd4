"""`farspan bench model` measures what it is told to and says what it cannot."""

import json
from pathlib import Path

import pytest

from farspan.cli.bench import parse_shape
from farspan.cli.main import main
from farspan.errors import ConfigError
from farspan.models import presets
from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    def config() -> FarspanConfig:
        return FarspanConfig(
            vocab_size=40, hidden_size=64, num_attention_heads=2, num_hidden_layers=2, mixers=["metala", "cosine"]
        )

    known = presets._all()
    monkeypatch.setattr(presets, "_all", lambda: {**known, "tiny": Preset(config, 0, "test")})


def test_seven_tokens_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", "tiny", "--decode", "1x1", "--tokens", "7", "--device", "cpu"]) == 0
    assert "generate" in capsys.readouterr().out


def test_loops_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "model", "tiny", "--decode", "1x3", "--tokens", "7", "--device", "cpu", "--loops"]
    assert main([*arguments, "eager"]) == 0
    assert "generate" not in capsys.readouterr().out
    assert main([*arguments, "captured"]) == 2
    assert "CUDA graphs need an NVIDIA GPU; leave it out" in " ".join(capsys.readouterr().err.split())


def test_training_and_decoding_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "speed.json"
    arguments = ["--train", "2x8", "1x16+checkpoint", "--decode", "2x5", "--tokens", "8", "--steps", "2", "--llama"]
    assert main(["bench", "model", "tiny", *arguments, "--device", "cpu", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [(row["model"], row["length"], row["checkpointed"]) for row in found["training"]] == [
        ("tiny", 8, False),
        ("tiny", 16, True),
        ("transformers LLaMA", 8, False),
        ("transformers LLaMA", 16, True),
    ]
    for row in found["training"]:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["length"] / (row["step_ms"] / 1000))
    assert [row["loop"] for row in found["decoding"]] == ["eager", "generate"]
    # Two rows: the float32 states of metala (2 heads, 16 × 32) and of cosine (2 heads, 32 × 32).
    assert all(row["cache_bytes"] > 2 * 4 * (2 * 16 * 32 + 2 * 32 * 32) for row in found["decoding"])
    assert {"command", "versions", "device"} <= set(found)
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "ms/token" in shown
    assert "…" not in shown


@pytest.mark.parametrize("text", ["16", "16x", "x4", "0x4", "2x8+fast", "2*8", "-1x4"])
def test_wrong_shapes(text: str) -> None:
    with pytest.raises(ConfigError, match="ROWSxTOKENS"):
        parse_shape(text)


def test_shapes() -> None:
    assert parse_shape("16x2048") == (16, 2048, False)
    assert parse_shape("1x32768+checkpoint") == (1, 32768, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "tiny"], "nothing to measure"),
        (["model", "tny", "--train", "1x8"], "Unknown preset 'tny'"),
        (["model", "tiny", "--decode", "1x8+checkpoint"], "no backward pass"),
        (["modle"], "did you mean 'model'"),
        (["model", "tiny", "--train", "1x8", "--steps", "0"], "steps=0 is not accepted; it has to be at least 1"),
        (["model", "tiny", "--decode", "1x8", "--tokens", "6"], "tokens=6 is not accepted; it has to be at least 7"),
        (["model", "cottention-bert-base", "--train", "1x8"], "cottention-bert-base is no language model"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
