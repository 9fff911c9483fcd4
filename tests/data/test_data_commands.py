"""`farspan data prepare` and `farspan data inspect`: what they show, and one clear line for every mistake."""

import os
from pathlib import Path

import pytest

from farspan.cli.main import main
from farspan.data.dataset import PreparedDataset


def run(*arguments: str | Path) -> int:
    return main(["data", *map(str, arguments)])


def test_prepare_then_inspect(corpus_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("prepare", "--corpus", corpus_directory, "--tokenizer", "bpe:300", "--out", out) == 0
    shown = capsys.readouterr().out
    assert run("inspect", out) == 0
    again = capsys.readouterr().out
    for text in (shown, again):
        assert all(word in text for word in ("train", "valid", "test", "bytes/token", "bpe:300", "uint16", "def f"))


def test_inspect_token_files_and_corpora(
    dataset: PreparedDataset, corpus_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in ("train", "train.bin", "train.idx"):
        assert run("inspect", dataset.directory / path) == 0
        assert f"{dataset.metadata.splits['train'].tokens:,}" in capsys.readouterr().out
    assert run("inspect", corpus_directory) == 0
    assert "61" in (shown := capsys.readouterr().out) and "00.py" in shown
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "good.txt").write_text("[bold]text[/bold] \x1b[31m")
    assert run("inspect", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "1 not UTF-8 (first: bad.txt)" in shown and "[bold]text[/bold]" in shown and "\x1b" not in shown


@pytest.mark.parametrize("command", ["prepare", "inspect"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "Example: farspan data" in capsys.readouterr().out


MISTAKES = {
    "inspect nothing there": (["inspect", "nothing"], "neither a path that exists nor a built-in corpus"),
    "inspect an empty directory": (["inspect", "EMPTY"], "no files found there"),
    "inspect a missing token file": (["inspect", "EMPTY/a.bin"], "a.idx does not exist"),
    "inspect a truncated dataset": (["inspect", "CUT"], "has 100 bytes but train.idx describes"),
    "inspect a token outside the vocabulary": (["inspect", "WILD"], "valid.bin is damaged: token 3 is 65535"),
    "inspect a dataset without its json": (["inspect", "HEADLESS"], "has no dataset.json"),
    "inspect a bad json line": (["inspect", "BAD.jsonl"], "line 1: not valid JSON"),
    "prepare an empty directory": (["prepare", "--corpus", "EMPTY", "--out", "OUT"], "no files found there"),
    "prepare an unknown corpus": (
        ["prepare", "--corpus", "python-std", "--out", "OUT"],
        "did you mean 'python-stdlib'",
    ),
    "prepare with a bad tokenizer": (["prepare", "--tokenizer", "bpe", "--out", "OUT"], "use 'byte', 'bpe:N'"),
    "prepare with a huge tokenizer": (
        ["prepare", "--tokenizer", f"bpe:{10**20}", "--out", "OUT"],
        "at most 2147483648",
    ),
    "prepare with an empty tokenizer": (["prepare", "--tokenizer", "EMPTY", "--out", "OUT"], "holds no tokenizer"),
    "prepare with bad fractions": (["prepare", "--valid-fraction", "2", "--out", "OUT"], "split fractions"),
    "prepare without workers": (["prepare", "--workers", "0", "--out", "OUT"], "workers=0"),
    "prepare over other files": (["prepare", "--out", "."], "is left alone"),
    "prepare a bad json line": (["prepare", "--corpus", "BAD.jsonl", "--out", "OUT"], "line 1: not valid JSON"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(
    case: str,
    dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    Path("BAD.jsonl").write_text("{")
    for name in ("CUT", "HEADLESS", "WILD"):
        shutil.copytree(dataset.directory, name)
    os.truncate("CUT/train.bin", 100)
    Path("HEADLESS/dataset.json").unlink()
    with Path("WILD/valid.bin").open("r+b") as file:
        file.seek(6)
        file.write(b"\xff\xff")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    arguments, message = MISTAKES[case]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
