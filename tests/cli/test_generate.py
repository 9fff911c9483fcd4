"""`farspan generate` on a tiny run."""

import io
import json
import sys
from pathlib import Path

import pytest

from farspan.cli.main import main

SHORT = ["--max-new-tokens", "12", "--device", "cpu"]


def generate(*argv: str) -> int:
    return main(["generate", *argv, *SHORT])


def test_text_on_stdout_and_speed_on_stderr(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(str(tiny_run), "def f") == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert captured.err.startswith("12 tokens in ") and "tokens/s" in captured.err


def test_the_text_depends_on_seed_and_prompt_alone(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*argv: str) -> str:
        assert generate(str(tiny_run), *argv) == 0
        return capsys.readouterr().out

    expected = text("def f", "--seed", "3")
    assert text("def f", "--seed", "3") == text("def f", "--seed", "3", "--no-stream") == expected
    assert text("def f", "--seed", "4") != expected
    both = text("def f", "--seed", "3", "--num-samples", "2")
    assert both == expected + text("def f", "--seed", "4")
    greedy = ("def f", "--temperature", "0")
    assert text(*greedy) == text(*greedy, "--no-cache")


def test_prompt_from_file_and_stdin(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text("déf", encoding="utf-8")
    texts = []
    for argv in (["déf"], ["--prompt-file", str(tmp_path / "prompt")], ["-"], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("déf".encode())))
        assert generate(str(tiny_run), *argv) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


def test_samples_are_saved_with_what_made_them(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "samples.json"
    options = ["--num-samples", "2", "--seed", "5", "--stop", "\\n", "--stop", "END", "--json", str(path)]
    assert generate(str(tiny_run), "x = 1", *options, "--check-python") == 0
    first, second = json.loads(path.read_text(encoding="utf-8"))
    assert (first["prompt"], first["seed"], second["seed"]) == ("x = 1", 5, 6)
    assert set(first) == {"prompt", "seed", "text", "complete", "tokens", "seconds", "options"}
    assert first["options"]["stop"] == ["\n", "END"]
    captured = capsys.readouterr()
    assert captured.out == first["text"] + "\n" + second["text"] + "\n"
    assert "complete lines read as Python" in captured.err
    assert generate(str(tiny_run), "--json", str(path)) == 0  # samples may be replaced by samples
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 1


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.cli.generate import _writer

    for terminal, expected in ((True, "a\ufffd[2Jé\t\n"), (False, "a\x1b[2Jé\t\n")):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stdout", stream)
        _writer()("a\x1b[2Jé\t\n")
        assert stream.getvalue() == expected
