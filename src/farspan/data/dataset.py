"""The prepared dataset: a directory of token files, byte lengths, the tokenizer, and ``dataset.json`` about them.

::

    dataset.json                     what is in it and what it was made from; written last
    tokenizer/                       the tokenizer, as `AutoTokenizer` loads it
    train.bin  train.idx             tokens; one item and one document per text, each ending with the end-of-document id
    train.bytes.npy                  int64 [documents]: UTF-8 bytes of each text, without the end-of-document token
    valid.*  test.*                  likewise
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farspan.data import _files
from farspan.data.corpora import SPLITS
from farspan.data.indexed import IndexedDataset, bin_path, idx_path
from farspan.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
METADATA = "dataset.json"
TOKENIZER = "tokenizer"


def bytes_path(prefix: Path) -> Path:
    """Where the byte lengths of the documents of a token file are: ``prefix.bytes.npy``."""
    return Path(f"{prefix}.bytes.npy")


@dataclass(frozen=True)
class SplitCounts:
    """What a split holds; `bytes` are those of the texts, `tokens` include the end-of-document tokens."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Metadata:
    """The content of ``dataset.json``.

    Args:
        corpus: name or path of the corpus.
        fingerprint: sha256 of the corpus.
        tokenizer: what was asked for (``byte``, ``bpe:4096``, a path).
        tokenizer_hash: sha256 of the tokenizer.
        vocab_size: number of ids of the tokenizer.
        end_of_document: id that ends every document.
        dtype: dtype of the token files.
        valid_fraction, test_fraction: shares asked for.
        text_field: field of ``.jsonl`` lines, None for the default.
        splits: counts by split.
        skipped_files: files of the corpus that are not UTF-8.
        farspan_version: version that wrote the dataset.
        format: version of this layout.
    """

    corpus: str
    fingerprint: str
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    end_of_document: int
    dtype: str
    valid_fraction: float
    test_fraction: float
    text_field: str | None
    splits: dict[str, SplitCounts]
    skipped_files: int
    farspan_version: str
    format: int = FORMAT

    def save(self, directory: Path) -> None:
        """Writes ``dataset.json`` atomically; from then on the directory counts as a dataset."""
        _files.write_bytes(directory / METADATA, json.dumps(asdict(self), indent=2).encode() + b"\n")

    @classmethod
    def load(cls, directory: Path) -> "Metadata":
        """Reads ``dataset.json``; a file of another form is a `DataError`."""
        path = directory / METADATA
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
            written = content["format"]
            if written != FORMAT:
                raise DataError(f"{path} has layout {written}; this version reads {FORMAT}. Prepare the data again.")
            splits = {name: SplitCounts(**counts) for name, counts in content.pop("splits").items()}
            return cls(**content, splits=splits)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            expected = ", ".join(field.name for field in fields(cls))
            raise DataError(
                f"{path} is damaged ({error}); it should hold: {expected}. Prepare the data again."
            ) from None


@dataclass(frozen=True)
class TokenDocument:
    """One document for evaluation.

    Args:
        index: number of the document in its split.
        tokens: int64 `[T]`, the last one ends the document.
        bytes: UTF-8 bytes of its text.
    """

    index: int
    tokens: np.ndarray
    bytes: int


class Split:
    """One split of a prepared dataset.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        data: its token file.
        bytes: int64 `[documents]`, UTF-8 bytes of each text.
        starts: int64 `[documents + 1]`, where each document starts in ``data.tokens``; the last entry is the end.
        vocab_size: number of ids that its tokens may have.
    """

    def __init__(self, directory: Path, name: str, counts: SplitCounts, vocab_size: int) -> None:
        self.name = name
        self.vocab_size = vocab_size
        path = bytes_path(directory / name)
        self.data = IndexedDataset(directory / name)
        try:
            self.bytes: np.ndarray = np.load(path)
        except (OSError, ValueError, EOFError):
            raise DataError(f"{path} is missing or damaged. Prepare the data again.") from None
        self.starts = self.data.document_starts
        found = SplitCounts(len(self.starts) - 1, len(self.data.tokens), int(self.bytes.sum()))
        if found != counts or len(self.bytes) != found.documents:
            raise DataError(f"{directory}: {METADATA} promises {counts} for {name}, the files hold {found}.")

    def __len__(self) -> int:
        return len(self.bytes)

    def documents(self) -> Iterator[TokenDocument]:
        """The documents in order, whole."""
        for index, (start, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            yield TokenDocument(index, self.read(int(start), int(end)), int(self.bytes[index]))

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens ``start .. end - 1`` of the split as int64.

        Raises:
            DataError: when one of them is not in the vocabulary; the message names the file and the place.
        """
        tokens: np.ndarray = self.data.tokens[start:end].astype(np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            place = int(((tokens < 0) | (tokens >= self.vocab_size)).argmax())
            raise DataError(
                f"{bin_path(self.data.prefix)} is damaged: token {start + place} is {tokens[place]}, and the "
                f"vocabulary has {self.vocab_size} entries. Prepare the data again."
            )
        return tokens


class PreparedDataset:
    """A prepared dataset directory, opened with `open_dataset`.

    Attributes:
        directory: where it is.
        metadata: the content of its ``dataset.json``.
    """

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self.directory = directory
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"PreparedDataset({str(self.directory)!r}, {self.metadata.splits})"

    @cached_property
    def _splits(self) -> dict[str, Split]:
        vocab_size = self.metadata.vocab_size
        return {name: Split(self.directory, name, counts, vocab_size) for name, counts in self.metadata.splits.items()}

    def split(self, name: str) -> Split:
        """The split called `name`, its files checked.

        Raises:
            DataError: when the split does not exist or holds no document.
        """
        if name not in self._splits:
            raise DataError(f"{self.directory} has no split {name!r}; {nearest(name, self._splits)}")
        split = self._splits[name]
        if not len(split):
            raise DataError(
                f"the {name} split of {self.directory} is empty: whole documents are dealt out, and none of the "
                "corpus fell there. Use a corpus of more documents or larger split fractions."
            )
        return split

    def documents(self, split: str) -> Iterator[TokenDocument]:
        """The documents of a split; see `Split.documents`."""
        return self.split(split).documents()

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer the dataset was made with."""
        from farspan.data.tokenizers import load_tokenizer

        return load_tokenizer(self.directory / TOKENIZER)


def open_dataset(directory: str | os.PathLike[str]) -> PreparedDataset:
    """Opens a prepared dataset.

    Raises:
        DataError: when the directory does not exist, is not a whole prepared dataset, or is damaged; the message names
            what is missing.
    """
    path = Path(directory)
    if not path.is_dir():
        raise DataError(f"dataset directory {path} does not exist. `farspan data prepare` makes one.")
    if not (path / METADATA).is_file():
        raise DataError(f"{path} is not a prepared dataset: it has no {METADATA}. `farspan data prepare` makes one.")
    metadata = Metadata.load(path)
    expected = [path / TOKENIZER]
    for name in SPLITS:
        expected += [bin_path(path / name), idx_path(path / name), bytes_path(path / name)]
    missing = [item.name for item in expected if not item.exists()]
    if missing:
        raise DataError(f"{path} is incomplete: {', '.join(missing)} missing. Prepare the data again.")
    return PreparedDataset(path, metadata)
