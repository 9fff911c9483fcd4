"""The rule that says whether a line reads as Python."""

import ast
import random
import tokenize
from pathlib import Path

import pytest

from farspan.evaluation.samples import LineCount, python_lines, python_share

STANDARD_LIBRARY = Path(ast.__file__).parent
PROSE = """The library has to measure how each task is built.
Facts marked here were checked against the source, or by running it.
It isn't what the five systems published? No, it is not!
Every token is scored once, whatever the window is.
"""


def share(text: str) -> float:
    return python_lines(text).share


@pytest.mark.parametrize("line", [
    "x = 1", "def f(self, *args, **kwargs) -> None:", "    return {'a': [1, 2], **b}", "@decorator", "x: int = 0x_ff",
    "foo(", "    'first', 'second',", "))", "}, (", "print('a' 'b', f'{x!r}', rb'\\x00')", "match point:",
    "case Point(x=0):", "type Pair = tuple[int, int]", "match = re.match(a, b)", "else:", "lambda: ...",
    "a if b else c", "# a comment, isn't it?", "    x = not y", "1_000.5e-3j", "import os, sys",
    "from . import x as y", '"""One line."""', "x = a @ b // c ** -d", "first = \\", "raise ValueError from None",
    "async with a as b, c:", "print(x, end='')  # done", "ünïcode = 'é'",
])  # fmt: skip
def test_python_is_good(line: str) -> None:
    assert python_lines(line + "\n") == LineCount(1, 1)


@pytest.mark.parametrize("line", [
    "the quick brown fox", "print x", "x = 'open", "what? no", "a $ b", "x = (1]", "f(x) y", "1 2", "x = 'a' b",
    "3abc", "\x00\x01", "It isn't", "x! = y", "None x", 'x """b"""',
])  # fmt: skip
def test_garbage_is_bad(line: str) -> None:
    assert python_lines(line + "\n") == LineCount(0, 1)


def test_last_line_and_blank_lines_are_not_counted() -> None:
    assert python_lines("x = 1\n\n   \ny = (broken 'line") == LineCount(1, 1)
    assert python_lines("") == python_lines("no end of line") == LineCount(0, 0)
    assert python_lines("").share == 0


def test_text_inside_a_closed_string_is_good() -> None:
    assert python_lines('def f():\n    """Say hello.\n\n    It isn\'t hard?\n    """\n    return 1\n') == LineCount(
        5, 5
    )
    assert python_lines("x = 'one \\\n two'\ny = 1\n") == LineCount(3, 3)


def test_text_inside_a_string_never_closed_is_not_counted() -> None:
    assert python_lines('x = 1\n"""Say hello.\nIt isn\'t hard?\n') == LineCount(1, 1)


def test_prompt_opens_strings_and_is_not_counted() -> None:
    assert python_lines('One more word.\n"""\nx = 1\nbad bad\n', prompt='x = 1\n"""Begin.\n') == LineCount(3, 4)
    assert python_lines("turn x\n", prompt="def f(x):\n    re") == LineCount(1, 1)


def test_samples_are_summed() -> None:
    assert python_share([("", "x = 1\n"), ("", "no no\n"), ("", "")]) == LineCount(1, 2)


@pytest.mark.parametrize(
    "name", ["ast.py", "argparse.py", "typing.py", "inspect.py", "string.py", "textwrap.py", "re/_parser.py"]
)
def test_the_standard_library_is_good(name: str) -> None:
    path = STANDARD_LIBRARY / name
    with tokenize.open(path) as file:
        assert share(file.read()) > 0.999


def test_prose_and_noise_are_bad() -> None:
    assert share(PROSE) == 0
    random.seed(0)
    noise = "".join(random.choices([*map(chr, range(256)), *"\n" * 4], k=20_000))
    assert share(noise) < 0.05
    letters = "".join(random.choices([*map(chr, range(32, 127)), *"\n" * 3], k=20_000))
    assert share(letters) < 0.3
