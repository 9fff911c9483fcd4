"""tests/PROPERTIES.md names a test for every property of every mechanism; each of them exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _tests_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+\.py)::(\w+)(?:\[[^`]*\])?`", (ROOT / "tests" / "PROPERTIES.md").read_text())
    assert len(named) >= 100
    found = {path: _tests_in(ROOT / path) if (ROOT / path).is_file() else set() for path in {path for path, _ in named}}
    missing = [f"{path}::{name}" for path, name in named if name not in found[path]]
    assert not missing, "\n".join(missing)


def test_every_row_names_a_test_or_says_what_it_needs() -> None:
    rows = [row for row in (ROOT / "tests" / "PROPERTIES.md").read_text().splitlines() if row.startswith("| ")]
    for row in rows:
        property_, _, test = row.strip("| ").rpartition(" | ")
        assert property_, row
        assert test in ("test", "---") or "`tests/" in test or test.startswith("needs "), row
