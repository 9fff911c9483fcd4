"""Corpora: streams of named documents, found by a built-in name or a path, split by a hash of each document's name.

A corpus is a sorted list of files. A text file is one document, named by its path relative to the corpus root; a line
of a ``.jsonl`` file is one document, named ``file:line``. The name alone decides the split, so a document stays in its
split when others come and go.
"""

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from farspan.errors import ConfigError, DataError, nearest

SPLITS = ("train", "valid", "test")
DEFAULT_TEXT_FIELDS = ("text", "content")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text of a corpus; `name` is its relative path, or ``file:line`` for a line of a ``.jsonl`` file."""

    name: str
    text: str


@dataclass(frozen=True)
class Fractions:
    """The expected shares of documents in the valid and test splits; train gets the rest.

    Args:
        valid: share of the valid split, in [0, 1).
        test: share of the test split, in [0, 1), with ``valid + test < 1``.
    """

    valid: float = 0.05
    test: float = 0.05

    def __post_init__(self) -> None:
        if not (self.valid >= 0 and self.test >= 0 and self.valid + self.test < 1):
            raise ConfigError(
                f"split fractions valid={self.valid}, test={self.test} are not accepted: each must be at least 0 "
                "and their sum below 1, so that train keeps something."
            )

    def split_of(self, name: str) -> str:
        """The split of the document called `name`."""
        position = name_hash(name)
        if position < self.valid:
            return "valid"
        return "test" if position < self.valid + self.test else "train"


def name_hash(name: str, salt: str = "name:") -> float:
    """A number in [0, 1) that depends on `name` and `salt` alone.

    The default salt decides the splits. It was chosen by size only: of the standard library, valid and test each get
    close to their share of the bytes, and its one huge file (generated help texts) stays in train.
    """
    digest = hashlib.sha256((salt + name).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


@dataclass(frozen=True)
class Scan:
    """What one pass over the bytes of a corpus finds.

    Args:
        fingerprint: sha256 over the sorted relative paths and the sha256 of each file's content.
        files: number of readable files.
        bytes: their size.
        skipped: relative paths of the files that are not UTF-8.
    """

    fingerprint: str
    files: int
    bytes: int
    skipped: tuple[str, ...]


class Corpus:
    """A sorted list of files, read as a stream of documents.

    Args:
        name: the name or path the corpus was asked for by.
        root: the folder that document names are relative to.
        files: the files, each below `root`.
        text_field: field of a ``.jsonl`` line that holds the text; None takes ``text``, or else ``content``.
        fractions: shares of the valid and test splits.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: list[Path],
        *,
        text_field: str | None = None,
        fractions: Fractions | None = None,
    ) -> None:
        self.name = name
        self.root = root
        self.text_field = text_field
        self.fractions = fractions or Fractions()
        self._files = sorted((path.relative_to(root).as_posix(), path) for path in files)

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self._files)} files)"

    @cached_property
    def scan(self) -> Scan:
        """Reads every file once: fingerprint, sizes, and which files are skipped because they are not UTF-8.

        Raises:
            DataError: when a file cannot be read, or none is UTF-8.
        """
        digest = hashlib.sha256()
        size, skipped = 0, []
        for name, path in self._files:
            content = hashlib.sha256()
            length = 0
            try:
                for line in _lines(path):
                    line.decode("utf-8")
                    content.update(line)
                    length += len(line)
            except UnicodeDecodeError:
                skipped.append(name)
                continue
            size += length
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content.digest())
        if len(skipped) == len(self._files):
            raise DataError(
                f"corpus {self.name!r}: none of its {len(skipped)} files is UTF-8 text (first: {skipped[0]})."
            )
        return Scan(digest.hexdigest(), len(self._files) - len(skipped), size, tuple(skipped))

    @property
    def fingerprint(self) -> str:
        """The sha256 that identifies the content of the corpus."""
        return self.scan.fingerprint

    def documents(self, split: str | None = None) -> Iterator[Document]:
        """The documents of `split` (None: of all splits) in the order of their files and lines.

        Files that are not UTF-8 are left out; `scan` lists them.

        Raises:
            DataError: when a file cannot be read, or a ``.jsonl`` line is not an object with a text.
        """
        if split is not None and split not in SPLITS:
            raise DataError(f"split {split!r} does not exist; {nearest(split, SPLITS)}")
        skipped = frozenset(self.scan.skipped)
        for name, path in self._files:
            if name in skipped:
                continue
            if path.suffix == ".jsonl":
                yield from self._json_lines(name, path, split)
            elif split is None or self.fractions.split_of(name) == split:
                yield Document(name, b"".join(_lines(path)).decode("utf-8"))

    def _json_lines(self, name: str, path: Path, split: str | None) -> Iterator[Document]:
        for number, line in enumerate(_lines(path), start=1):
            place = f"{name}:{number}"
            if line.isspace() or (split is not None and self.fractions.split_of(place) != split):
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error}). Mend or remove the line.") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: holds a {type(record).__name__}, not a JSON object.")
            accepted = (self.text_field,) if self.text_field else DEFAULT_TEXT_FIELDS
            field = next((field for field in accepted if field in record), None)
            if field is None:
                wanted = " or ".join(map(repr, accepted))
                raise DataError(
                    f"{path}, line {number}: has no field {wanted}; its fields are: {', '.join(record) or 'none'}. "
                    "Name the one that holds the text with text_field."
                )
            if not isinstance(record[field], str):
                kind = type(record[field]).__name__
                raise DataError(f"{path}, line {number}: field {field!r} holds a {kind}, not a string.")
            if _SURROGATE.search(record[field]):
                raise DataError(
                    f"{path}, line {number}: field {field!r} holds half a character (an unpaired surrogate)."
                )
            yield Document(place, record[field])


def open_corpus(spec: str | Path, *, text_field: str | None = None, fractions: Fractions | None = None) -> Corpus:
    """Finds a corpus by built-in name, or by the path of a folder, a glob, a text file or a ``.jsonl`` file.

    Of a folder, every file below it is taken except hidden ones, ``__pycache__`` and prepared datasets.

    Args:
        spec: a name of `CORPORA`, or a path; a glob may contain ``**``.
        text_field: field of ``.jsonl`` lines that holds the text; None takes ``text``, or else ``content``.
        fractions: shares of the valid and test splits; None takes 5 % each.

    Raises:
        DataError: for an unknown name, a path that does not exist, or one without files.

    Example:
        >>> corpus = open_corpus("python-stdlib")
        >>> next(corpus.documents("train")).name
        '__future__.py'
    """
    spec = str(spec)
    if spec in CORPORA:
        root, files = CORPORA[spec]()
    else:
        root, files = _find_files(spec)
    if not files:
        raise DataError(f"corpus {spec!r}: no files found there. Give a folder, glob or file with text in it.")
    return Corpus(spec, root, files, text_field=text_field, fractions=fractions)


def _find_files(spec: str) -> tuple[Path, list[Path]]:
    path = Path(spec).expanduser()
    if path.is_dir():
        return path, _walk(path)
    if path.exists():
        return path.parent, [path]
    if glob.has_magic(spec):
        fixed = list(path.parts)
        while fixed and glob.has_magic("/".join(fixed)):
            fixed.pop()
        root = Path(*fixed) if fixed else Path(".")
        found = (Path(match) for match in glob.glob(str(path), recursive=True))
        return root, [match for match in found if match.is_file()]
    raise DataError(f"corpus {spec!r} is neither a path that exists nor a built-in corpus; {nearest(spec, CORPORA)}")


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """The files below `root`, without hidden ones, caches, prepared datasets and folders named in `skip`."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}.") from None

    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        if {"dataset.json", "train.idx"} <= set(names):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip | {"__pycache__"}]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file as bytes, line ends kept; a file that cannot be read is a `DataError`."""
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None


def _python_stdlib() -> tuple[Path, list[Path]]:
    """The standard library of the running interpreter, without its tests and without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
    return root, [path for path in _walk(root, skip) if path.suffix == ".py"]


CORPORA: dict[str, Callable[[], tuple[Path, list[Path]]]] = {"python-stdlib": _python_stdlib}
"""Built-in corpora: name -> function that returns the root folder and the files below it."""
