r"""How much of a sampled text reads as Python, line by line.

The rule, the same on every Python version. Of the complete lines (all but the last, which the length limit may have
cut), blank lines are not counted. A line is good when, read from left to right, it consists of Python's tokens and

1. no character belongs to no token (`?`, `$`, a lone `!`, a control character, a quote that is not closed on the line);
2. no two operands (names, numbers, strings, closing brackets) stand side by side, as they do in prose: between them
   belongs an operator or a keyword. Allowed are two strings in a row and the soft keywords `match`, `case` and `type`
   at the start of a line;
3. brackets that open and close on the line match. Brackets left open, or closed from an earlier line, are fine.

Triple-quoted strings are followed over the lines. Lines inside one that is closed later in the text are good, whatever
they say, because the string as a whole is a token; lines inside one that is never closed are not counted.
"""

import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass

_PREFIX = r"(?:[rRbBuUfF]|[rR][bBfF]|[bBfF][rR])?"
_TOKENS = re.compile(
    rf"""
      (?P<triple>  {_PREFIX}(?:'''|\"\"\") )
    | (?P<string>  {_PREFIX}(?: '(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*" ) )
    | (?P<open>    {_PREFIX}(?: '(?:\\.|[^'\\])*\\$ | "(?:\\.|[^"\\])*\\$ ) )
    | (?P<number>  0[xX](?:_?[0-9a-fA-F])+ | 0[bB](?:_?[01])+ | 0[oO](?:_?[0-7])+
                 | (?: \d(?:_?\d)*\.(?:\d(?:_?\d)*)? | \.\d(?:_?\d)* | \d(?:_?\d)* )(?:[eE][+-]?\d(?:_?\d)*)?[jJ]? )
    | (?P<name>    [^\W\d]\w* )
    | (?P<bracket> [()\[\]{{}}] )
    | (?P<operator> \*\*=? | //=? | >>=? | <<=? | \.\.\. | -> | := | [-+*/%@&|^<>=!]= | [-+*/%@&|^<>=~.,:;] )
    | (?P<space>   [ \t\f]+ )
    | (?P<comment> \#.* )
    | (?P<join>    \\$ )
    """,
    re.VERBOSE,
)
_SOFT_KEYWORDS = ("match", "case", "type")
_VALUES = ("True", "False", "None")  # keywords that are operands
_CLOSES = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class LineCount:
    """Counted lines of one or more texts, and how many of them are good."""

    good: int
    lines: int

    @property
    def share(self) -> float:
        """`good / lines`; 0 when no line was counted."""
        return self.good / self.lines if self.lines else 0.0

    def __add__(self, other: "LineCount") -> "LineCount":
        return LineCount(self.good + other.good, self.lines + other.lines)


def python_lines(text: str, *, prompt: str = "") -> LineCount:
    """Counts the complete lines of a text that read as Python, by the rule at the head of this module.

    Args:
        text: the sampled text, without its prompt.
        prompt: what the text continues; it is read too, so that strings opened there are known, but its own lines are
            not counted. The line on which it ends counts as the text's.

    Example:
        >>> python_lines("for x in range(3):\\n    print x\\n")
        LineCount(good=1, lines=2)
    """
    verdicts = _verdicts((prompt + text).split("\n")[:-1])[prompt.count("\n") :]
    counted = [verdict for verdict in verdicts if verdict is not None]
    return LineCount(sum(counted), len(counted))


def python_share(samples: Iterable[tuple[str, str]]) -> LineCount:
    """Sums `python_lines` over samples, each a pair of prompt and text."""
    return sum((python_lines(text, prompt=prompt) for prompt, text in samples), LineCount(0, 0))


def _verdicts(lines: list[str]) -> list[bool | None]:
    """For each line: good, bad, or None when it is not counted."""
    verdicts: list[bool | None] = []
    delimiter = ""  # of the string that is open at the start of the line
    opened_at = 0
    for number, line in enumerate(lines):
        good, left_open = _read_line(line.rstrip("\r"), delimiter)
        if not delimiter:
            opened_at = number
        delimiter = left_open
        verdicts.append(good if line.strip() else None)
    if delimiter:
        verdicts[opened_at:] = [None] * (len(verdicts) - opened_at)
    return verdicts


def _read_line(line: str, delimiter: str) -> tuple[bool, str]:
    """Reads one line that starts inside a string with this delimiter ("": in code).

    Returns:
        Whether the line is good, and the delimiter of the string that is open at its end ("" when none is).
    """
    at, good, before = 0, True, ""  # before: the operand that the last token was, if it was one
    brackets: list[str] = []
    while at < len(line) or delimiter:
        if delimiter:
            end = _end_of_string(line, at, delimiter)
            if end < 0:
                goes_on = len(delimiter) == 3 or line.endswith("\\")
                return good and goes_on, delimiter if goes_on else ""
            at, before, delimiter = end, "string", ""
            continue
        match = _TOKENS.match(line, at)
        if match is None:
            return False, ""
        kind, token = str(match.lastgroup), match.group()
        at = match.end()
        if kind in ("triple", "open"):
            good &= before in ("", "string")
            quotes = token.lstrip("rRbBuUfF")
            if kind == "open":
                return good, quotes[0]
            delimiter = quotes
        elif kind == "bracket" and token in _CLOSES:
            good &= not brackets or brackets.pop() == _CLOSES[token]
            before = "operand"
        elif kind == "bracket":
            brackets.append(token)
            before = ""
        elif kind in ("string", "number", "name"):
            operand = kind != "name" or token in _VALUES or not keyword.iskeyword(token)
            good &= not (operand and before) or kind == before == "string"
            soft = kind == "name" and token in _SOFT_KEYWORDS and not line[: match.start()].strip()
            before = "" if soft or not operand else "string" if kind == "string" else "operand"
        elif kind == "operator":
            before = ""
    return good, ""


def _end_of_string(line: str, start: int, delimiter: str) -> int:
    """Where the string that is open at `start` ends on this line, or -1."""
    at = start
    while at < len(line):
        if line[at] == "\\":
            at += 2
        elif line.startswith(delimiter, at):
            return at + len(delimiter)
        else:
            at += 1
    return -1
