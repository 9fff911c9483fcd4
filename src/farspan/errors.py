"""The exceptions that Farspan raises for mistakes a user can mend.

Every message says what was wrong, what was given, what is accepted and what to do. The command line prints it alone,
without a traceback, and leaves with exit code 2.
"""

import difflib
from collections.abc import Iterable


class FarspanError(Exception):
    """Base of all errors that are the input's fault, not the program's."""


class ConfigError(FarspanError, ValueError):
    """A configuration value, name or combination that is not accepted."""


class ShapeError(FarspanError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit the operator's contract."""


class DataError(FarspanError, ValueError):
    """A corpus, token file or tokenizer that is missing, damaged or of another form."""


class CheckpointError(FarspanError, ValueError):
    """A model directory or training checkpoint that is missing, incomplete or of another model."""


class BackendUnavailable(FarspanError, RuntimeError):
    """A backend that was asked for by name and cannot serve here; the reason is in the message."""


def nearest(name: str, accepted: Iterable[str]) -> str:
    """Ends an error message about an unknown `name`: the nearest of the `accepted` names, then all of them."""
    names = sorted(set(accepted))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Accepted: {', '.join(names) if names else 'none'}."
