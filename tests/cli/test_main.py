"""The program itself: help, exit codes, errors in one line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.cli import main as program
from farspan.cli.main import COMMANDS, main
from farspan.errors import ConfigError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Makes `farspan info` raise an exception."""

    def install(error: BaseException) -> None:
        def run(argv: list[str]) -> int:
            raise error

        monkeypatch.setattr(program.importlib, "import_module", lambda name: type("module", (), {"run": run}))

    return install


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name} " in text for name in COMMANDS)


def test_no_command_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: farspan" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("farspan 0.")


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat"]) == 2
    assert "did you mean 'generate'?" in capsys.readouterr().err
    assert main(["data", "prepar"]) == 2
    assert "did you mean 'prepare'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*COMMANDS, "data prepare", "data inspect"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"farspan {command}" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_codes_are_fixed(failing, capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
    cases = [
        (ConfigError("a long message " * 20 + "[bold]"), 2, "error: a long message"),
        (full, 2, "error: /disk/file: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: Permission denied; choose a place"),
        (MemoryError(), 2, "error: out of memory"),
        (RuntimeError("CUDA out of memory."), 2, "error: out of memory: CUDA"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
    ]
    for error, code, beginning in cases:
        failing(error)
        assert main(["info"]) == code
        text = capsys.readouterr().err
        assert text.startswith(beginning)
        assert text.count("\n") == bool(beginning)
        assert "Traceback" not in text


def test_faults_of_the_program_keep_their_traceback(failing) -> None:
    failing(RuntimeError("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["info"])


@pytest.mark.parametrize("asked", ["argument", "variable"])
def test_debug_shows_the_traceback(asked: str, failing, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(ConfigError("mistake"))
    if asked == "variable":
        monkeypatch.setenv("FARSPAN_DEBUG", "1")
    assert main(["info", "--debug"] if asked == "argument" else ["info"]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("error: mistake\n")


def test_debug_after_two_dashes_belongs_to_the_command() -> None:
    assert program._split_debug(["generate", "x", "--", "--debug"])[0] == ["generate", "x", "--", "--debug"]


def run_program(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "farspan.cli.main", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from farspan.cli.main import main; main(['--help']); main(['evla']);"
        "print([name for name in ('torch', 'transformers', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[]\n"), done.stdout


def test_as_a_program(tmp_path: Path) -> None:
    done = run_program("eval", str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    done = run_program("info", "--json")
    assert done.returncode == 0
    assert set(json.loads(done.stdout)) >= {"versions", "cpu", "operators", "mixers"}


def test_output_in_another_encoding(tmp_path: Path) -> None:
    done = run_program("info", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_no_error() -> None:
    script = f"{sys.executable} -m farspan.cli.main info --json | head -c 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{", "")
