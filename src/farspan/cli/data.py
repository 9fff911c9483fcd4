"""`farspan data prepare` and `farspan data inspect`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from farspan.cli import _output
from farspan.data.corpora import SPLITS, open_corpus
from farspan.data.dataset import METADATA, PreparedDataset, open_dataset
from farspan.data.indexed import IndexedDataset, bin_path, idx_path
from farspan.data.prepare import prepare

_HEAD_LINES = 12
_HEAD_TOKENS = 400
_HEAD_IDS = 64
_READ_TOKENS = 1 << 24


def prepare_command(
    *,
    corpus: str = "python-stdlib",
    tokenizer: str = "bpe:4096",
    out: Path = Path("data"),
    valid_fraction: float = 0.05,
    test_fraction: float = 0.05,
    text_field: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Tokenise a corpus once, so that training reads it through a memory map.

    The corpus is python-stdlib (the standard library of this Python), a folder, a glob such as 'books/**/*.txt', a text
    file, or a .jsonl file. Whole documents are dealt out to train, valid and test by a hash of their names. A run that
    was stopped goes on where it was when it is run again; one that is done returns at once.

    Example: farspan data prepare --corpus books --tokenizer bpe:8192 --out books-bpe8192

    Args:
        corpus: What to read: a built-in name or a path.
        tokenizer: 'byte', 'bpe:N' (trained on the train split), or a directory with a Hugging Face tokenizer.
        out: The directory to make.
        valid_fraction: Share of the documents for the valid split.
        test_fraction: Share of the documents for the test split.
        text_field: Field of a .jsonl line that holds the text; by default 'text', or else 'content'.
        workers: Threads that tokenise; by default one per processor, at most 16.
        overwrite: Replace a dataset in the directory that was made from other inputs.
    """
    dataset = prepare(
        corpus,
        tokenizer,
        out,
        valid=valid_fraction,
        test=test_fraction,
        text_field=text_field,
        workers=workers,
        overwrite=overwrite,
    )
    _show_dataset(dataset)


def inspect_command(
    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")], *, text_field: str | None = None
) -> None:
    """Show what is in a prepared dataset, a pair of .bin/.idx token files, or a corpus.

    Example: farspan data inspect books-bpe8192

    Args:
        what: A prepared directory, the path of token files with or without .bin/.idx, or a corpus by name or path.
        text_field: Field of a .jsonl line that holds the text; by default 'text', or else 'content'.
    """
    path = Path(what)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if (path / METADATA).exists() or idx_path(path / SPLITS[0]).exists():
        _show_dataset(open_dataset(path))
    elif path != prefix or idx_path(prefix).exists() or bin_path(prefix).exists():
        _show_token_file(prefix)
    else:
        _show_corpus(what, text_field)


COMMANDS: dict[str, Callable[..., None]] = {"prepare": prepare_command, "inspect": inspect_command}
"""The commands under `farspan data`."""


def _show_dataset(dataset: PreparedDataset) -> None:
    about = dataset.metadata
    rows, lengths = [], {}
    for name, counts in about.splits.items():
        per_token = counts.bytes / counts.tokens if counts.tokens else 0.0
        rows.append([name, *_numbers(counts.documents, counts.tokens, counts.bytes), f"{per_token:.2f}"])
        lengths[name] = np.zeros(0)
        if counts.documents:
            split = dataset.split(name)
            lengths[name] = np.diff(split.starts)
            for start in range(0, counts.tokens, _READ_TOKENS):
                split.read(start, start + _READ_TOKENS)  # refuses what is not in the vocabulary
    _print_table(f"Dataset {dataset.directory}", ["split", "documents", "tokens", "bytes", "bytes/token"], rows)
    _print_lengths("tokens", lengths)
    _print_facts(
        {
            "corpus": about.corpus,
            "fingerprint": about.fingerprint,
            "tokenizer": f"{about.tokenizer}, {about.vocab_size:,} entries, {about.end_of_document} ends a document",
            "stored as": about.dtype,
            "skipped files": f"{about.skipped_files} not UTF-8" if about.skipped_files else None,
        }
    )
    first = next(dataset.documents("train")).tokens[:_HEAD_TOKENS]
    _print_head("first document of train", dataset.load_tokenizer().decode(first))


def _show_token_file(prefix: Path) -> None:
    data = IndexedDataset(prefix)
    lengths = np.diff(data.document_starts)
    row = _numbers(len(lengths), len(data), len(data.tokens))
    _print_table(f"Token files {prefix}.bin/.idx", ["documents", "items", "tokens"], [row])
    _print_lengths("tokens", {"all": lengths})
    _print_facts({"stored as": data.dtype.name})
    if len(data):
        _print_head("first item", " ".join(map(str, data[0][:_HEAD_IDS].tolist())))


def _show_corpus(what: str, text_field: str | None) -> None:
    corpus = open_corpus(what, text_field=text_field)
    sizes = {
        split: np.array([len(document.text.encode()) for document in corpus.documents(split)], dtype=np.int64)
        for split in SPLITS
    }
    rows = [[split, *_numbers(len(values), int(values.sum()))] for split, values in sizes.items()]
    _print_table(f"Corpus {corpus.name}", ["split", "documents", "bytes"], rows)
    _print_lengths("bytes", sizes)
    skipped = corpus.scan.skipped
    _print_facts(
        {
            "folder": corpus.root,
            "files": f"{corpus.scan.files:,}",
            "fingerprint": corpus.fingerprint,
            "skipped files": f"{len(skipped)} not UTF-8 (first: {skipped[0]})" if skipped else None,
        }
    )
    first = next(corpus.documents(), None)
    if first is not None:
        _print_head(first.name, first.text)


def _numbers(*values: int) -> list[str]:
    return [f"{value:,}" for value in values]


def _print_lengths(unit: str, lengths: dict[str, np.ndarray]) -> None:
    """A table of quantiles of document lengths by split."""
    rows = []
    for name, values in lengths.items():
        quantiles = np.quantile(values, [0.0, 0.1, 0.5, 0.9, 1.0]) if len(values) else []
        rows.append([name, *(_numbers(*map(int, quantiles)) or ["-"] * 5)])
    _print_table(f"{unit.capitalize()} per document", ["split", "shortest", "10 %", "median", "90 %", "longest"], rows)


def _print_table(title: str, columns: Iterable[str], rows: Iterable[list[str]]) -> None:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _output.out.print(table)


def _print_facts(facts: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, Text(str(value)))
    _output.out.print(table)


def _print_head(title: str, text: str) -> None:
    lines = text.splitlines()[:_HEAD_LINES]
    shown = "\n".join("".join(c if c.isprintable() else " " for c in line) for line in lines)
    _output.out.print(Panel(Text(shown), title=Text(title), title_align="left"))
