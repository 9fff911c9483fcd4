"""Tokenises a corpus once, to a prepared dataset directory: in parallel, restartable, all or nothing.

Everything is written to a hidden directory beside the destination, shard by shard; a shard is whole when it has its
``.idx``. A run that was stopped goes on where it was when it is run again with the same inputs. The shards of a split
become one token file; at last ``dataset.json`` is written and the directory gets the destination's name.
"""

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import farspan
from farspan.data import _files, _staging
from farspan.data.corpora import SPLITS, Corpus, Document, Fractions, name_hash, open_corpus
from farspan.data.dataset import METADATA, TOKENIZER, Metadata, PreparedDataset, SplitCounts, bytes_path, open_dataset
from farspan.data.indexed import IndexedDataset, IndexedWriter, idx_path, token_dtype
from farspan.data.tokenizers import bpe_size, document_encoder, end_of_document_id, load_tokenizer, tokenizer_hash
from farspan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 1 << 26
BPE_TRAINING_BYTES = 1 << 28
_BATCH_BYTES = 1 << 18
_MOST_WORKERS = 16
_log = logging.getLogger(__name__)


def prepare(
    corpus: str | Path | Corpus = "python-stdlib",
    tokenizer: str | Path = "byte",
    out: str | os.PathLike[str] = "dataset",
    *,
    valid: float = 0.05,
    test: float = 0.05,
    text_field: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> PreparedDataset:
    """Tokenises a corpus to the directory `out`; returns at once when that was done before from the same inputs.

    Every document ends with the tokenizer's end-of-sequence token; texts without a character are left out.

    Args:
        corpus: built-in name, path, or an opened `Corpus` (whose own fractions and text field then count).
        tokenizer: ``byte``, ``bpe:N`` (trained on the train split), or the directory of a Hugging Face tokenizer.
        out: the directory to make.
        valid: share of documents in the valid split.
        test: share of documents in the test split.
        text_field: field of ``.jsonl`` lines that holds the text; None takes ``text``, or else ``content``.
        workers: threads that tokenise (the tokenizer library runs outside Python's lock); None takes one per
            processor, at most 16.
        overwrite: replace a dataset in `out` that was made from other inputs; without it that is an error. The old
            one stays whole until the new one is.
        progress: show a progress bar; None shows it on terminals only.
        shard_bytes: text per shard, the unit that a stopped run keeps.

    Returns:
        The opened dataset.

    Raises:
        DataError: for an unusable corpus, tokenizer or destination, an empty train split, or a full disk.
        ConfigError: for options that are not accepted.
    """
    for name, value in (("workers", workers), ("shard_bytes", shard_bytes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not accepted; it has to be at least 1.")
    if not isinstance(corpus, Corpus):
        corpus = open_corpus(corpus, text_field=text_field, fractions=Fractions(valid, test))
    request = _Request.of(corpus, str(tokenizer))
    destination = Path(os.path.abspath(out))
    if not _staging.interrupted(destination) and (done := _finished(destination, request, overwrite)) is not None:
        return done
    with _staging.locked(destination) as staging:
        _staging.restore(destination)
        if (done := _finished(destination, request, overwrite)) is not None:
            return done
        if skipped := corpus.scan.skipped:
            _log.warning(
                "%s: %d files are not UTF-8 and are left out (first: %s)", corpus.name, len(skipped), skipped[0]
            )
        with _files.writing(staging), _progress_bar(progress) as bar:
            _staging.discard_other_work(staging, {**asdict(request), "shard_bytes": shard_bytes})
            workers = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
            _build(staging, corpus, request, workers, shard_bytes, bar)
            _staging.install(staging, destination)
    return open_dataset(destination)


@dataclass(frozen=True)
class _Request:
    """Everything that the content of a dataset depends on; a BPE to be trained follows from the rest."""

    fingerprint: str
    tokenizer: str
    tokenizer_hash: str | None
    valid_fraction: float
    test_fraction: float
    text_field: str | None
    farspan_version: str = farspan.__version__

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: str) -> "_Request":
        known = None if bpe_size(tokenizer) is not None else tokenizer_hash(load_tokenizer(tokenizer))
        valid, test = corpus.fractions.valid, corpus.fractions.test
        return cls(corpus.fingerprint, tokenizer, known, valid, test, corpus.text_field)

    def differences(self, made_from: Metadata) -> list[str]:
        """The inputs in which a finished dataset differs, as text."""
        names = ("fingerprint", "valid_fraction", "test_fraction", "text_field")
        pairs = [(name, getattr(made_from, name), getattr(self, name)) for name in names]
        texts = [f"{name} {found!s:.12} instead of {wanted!s:.12}" for name, found, wanted in pairs if found != wanted]
        by = "tokenizer_hash" if self.tokenizer_hash else "tokenizer"
        if getattr(made_from, by) != getattr(self, by):
            texts.append(f"tokenizer {made_from.tokenizer} instead of {self.tokenizer}, or of other content")
        return texts


def _finished(destination: Path, request: _Request, overwrite: bool) -> PreparedDataset | None:
    """The dataset at `destination` if it is what `request` asks for, None if one may be put there."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    if not (destination / METADATA).is_file():
        raise DataError(f"{destination} exists and is not a prepared dataset; it is left alone. Choose another place.")
    try:
        dataset = open_dataset(destination)
        problem = ", ".join(request.differences(dataset.metadata))
    except DataError as error:
        problem = str(error)
    if not problem:
        return dataset
    if not overwrite:
        raise DataError(
            f"{destination} was prepared from other inputs ({problem}). Choose another place, or overwrite it."
        )
    return None


def _build(staging: Path, corpus: Corpus, request: _Request, workers: int, shard_bytes: int, bar: Progress) -> None:
    """Makes `staging` a whole dataset, starting from what is already in it."""
    if not any(document.text for document in corpus.documents("train")):
        raise DataError(
            f"corpus {corpus.name!r} has no text in its train split; it needs more documents or smaller fractions for "
            "valid and test."
        )
    tokenizer = _tokenizer(staging / TOKENIZER, corpus, request.tokenizer)
    task = bar.add_task("tokenising", total=corpus.scan.bytes)
    splits = {}
    pool = ThreadPoolExecutor(workers)
    try:
        encode = _BatchEncoder(pool, tokenizer, lambda count: bar.advance(task, count))
        for split in SPLITS:
            splits[split] = _build_split(staging / split, corpus, encode, shard_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    Metadata(
        corpus=corpus.name,
        fingerprint=request.fingerprint,
        tokenizer=request.tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=len(tokenizer),
        end_of_document=encode.end,
        dtype=encode.dtype.name,
        valid_fraction=request.valid_fraction,
        test_fraction=request.test_fraction,
        text_field=request.text_field,
        splits=splits,
        skipped_files=len(corpus.scan.skipped),
        farspan_version=request.farspan_version,
    ).save(staging)


def _tokenizer(directory: Path, corpus: Corpus, spec: str) -> "PreTrainedTokenizerBase":
    """The tokenizer an earlier run saved, or a new one, saved."""
    if not directory.is_dir():
        tokenizer = load_tokenizer(spec, _training_texts(corpus))
        tokenizer.save_pretrained(_files.partial(directory))
        _files.publish(directory)
    return load_tokenizer(directory)


def _training_texts(corpus: Corpus) -> Iterator[str]:
    """The texts of the train split; of a large corpus an even sample, by a hash of their names."""
    share = BPE_TRAINING_BYTES / max(1, corpus.scan.bytes)
    return (item.text for item in corpus.documents("train") if share >= 1 or name_hash(item.name, "sample:") < share)


class _BatchEncoder:
    """Tokenises documents on a pool of threads, in order, each ended by the end-of-document id."""

    def __init__(
        self, pool: ThreadPoolExecutor, tokenizer: "PreTrainedTokenizerBase", report: Callable[[int], None]
    ) -> None:
        self.pool = pool
        self.report = report
        self.encode = document_encoder(tokenizer)
        self.end = end_of_document_id(tokenizer)
        self.dtype = token_dtype(len(tokenizer))

    def __call__(self, documents: list[Document]) -> Iterator[np.ndarray]:
        for batch in self.pool.map(self._batch, list(_groups(documents, _BATCH_BYTES))):
            yield from batch

    def _batch(self, documents: list[Document]) -> list[np.ndarray]:
        tokens = [np.append(self.encode(document.text), self.end) for document in documents]
        self.report(sum(map(_size, documents)))
        return tokens


def _build_split(prefix: Path, corpus: Corpus, encode: _BatchEncoder, shard_bytes: int) -> SplitCounts:
    """Writes the shards of a split that are missing, then joins them; shards that are joined are removed."""
    if not idx_path(prefix).exists():
        texts = (document for document in corpus.documents(prefix.name) if document.text)
        shards = []
        for number, documents in enumerate(_groups(texts, shard_bytes)):
            shard = prefix.with_name(f"{prefix.name}-{number:05d}")
            shards.append(shard)
            if idx_path(shard).exists():
                encode.report(sum(map(_size, documents)))
                continue
            _save_array(bytes_path(shard), np.array([_size(document) for document in documents], dtype=np.int64))
            with IndexedWriter(shard, encode.dtype) as writer:
                for tokens in encode(documents):
                    writer.add_document(tokens)
        lengths = [np.load(bytes_path(shard)) for shard in shards]
        _save_array(bytes_path(prefix), np.concatenate([np.zeros(0, np.int64), *lengths]))
        with IndexedWriter(prefix, encode.dtype) as writer:
            for shard in shards:
                writer.merge(shard)
    for leftover in prefix.parent.glob(f"{prefix.name}-*"):
        leftover.unlink()
    lengths = np.load(bytes_path(prefix))
    return SplitCounts(len(lengths), len(IndexedDataset(prefix).tokens), int(lengths.sum()))


def _groups(documents: Iterable[Document], most_bytes: int) -> Iterator[list[Document]]:
    """Consecutive documents in lists that end as soon as they hold `most_bytes` or more."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += _size(document)
        if size >= most_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _size(document: Document) -> int:
    return len(document.text.encode())


def _save_array(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values)
    _files.write_bytes(path, buffer.getvalue())


def _progress_bar(shown: bool | None) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (console.is_terminal if shown is None else shown))
