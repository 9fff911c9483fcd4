"""No two places in the source share ten or more identical lines, imports and blank lines aside."""

import io
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src"


@pytest.mark.slow
def test_no_ten_lines_stand_twice() -> None:
    similar = pytest.importorskip("pylint.checkers.symilar", reason="needs pylint (pip install 'farspan[dev]')")
    finder = similar.Symilar(min_lines=10, ignore_comments=False, ignore_docstrings=False, ignore_imports=True)
    for path in sorted(ROOT.rglob("*.py")):
        finder.append_stream(str(path.relative_to(ROOT)), io.StringIO(path.read_text(encoding="utf-8")))
    found = [
        f"{number} lines: " + " ~ ".join(sorted(f"{lines.name}:{start}-{end}" for lines, start, end in places))
        for number, places in finder._compute_sims()
    ]
    assert not found, "\n".join(found)
