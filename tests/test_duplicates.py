"""No two places in the source share more than ten identical lines of code; imports and signatures may repeat."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "src"
TOO_MANY = 11


def _lines(text: str) -> list[tuple[int, str]]:
    """Number and content of every line that says something and is neither imported nor declared by it."""
    declared: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            declared.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef):
            declared.update(range(node.lineno, node.body[0].lineno))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return [(number, line) for number, line in lines if number not in declared and re.search(r"\w", line)]


def _twice(texts: dict[str, str]) -> list[str]:
    """Where the same `TOO_MANY` lines begin again, as `file:line ~ file:line`."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, text in texts.items():
        lines = _lines(text)
        for i in range(len(lines) - TOO_MANY + 1):
            places[tuple(line for _, line in lines[i : i + TOO_MANY])].append(f"{name}:{lines[i][0]}")
    return [" ~ ".join(found) for found in places.values() if len(found) > 1]


def test_no_eleven_lines_stand_twice() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
    assert len(texts) > 100
    assert not (found := _twice(texts)), "\n".join(found)


def test_what_stands_twice_is_found() -> None:
    signature = "def f(\n" + "".join(f"    x{i}: int,\n" for i in range(12)) + ") -> None:\n"
    body = "".join(f"    y{i} = {i}\n\n" for i in range(TOO_MANY))
    assert _twice({"a.py": signature + body, "b.py": "import os\n" + signature + body}) == ["a.py:15 ~ b.py:16"]
    assert not _twice({"a.py": signature + body, "b.py": signature + body.replace("= 4", "= 5")})
