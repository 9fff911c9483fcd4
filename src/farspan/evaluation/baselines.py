"""What a language model has to beat on the same text: an n-gram model of bytes, and a general-purpose compressor.

Both read the train split (at most `MAX_BYTES` of it, documents spread evenly) and are charged for the text of the
evaluated split and for the end of each document, per byte of text, exactly as models are (`evaluation.perplexity`).
The n-gram model, like models, knows nothing of earlier documents; the compressor has seen them all, and so is reported
twice: after the train split, as compressed bytes of train + split minus those of train, and alone on the split.
"""

import contextlib
import json
import lzma
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.data import _files
from farspan.errors import DataError
from farspan.evaluation.ngram import NgramModel
from farspan.evaluation.perplexity import spread

if TYPE_CHECKING:
    from farspan.data.dataset import PreparedDataset

ORDER = 6
MAX_BYTES = 1 << 25
CACHE = "baselines.json"
_VERSION = 1  # raise it when a baseline is computed in another way: cached numbers are then computed anew
_END = b"\0"


@dataclass(frozen=True)
class Baseline:
    """One baseline on one split.

    Attributes:
        name: short name for tables.
        method: what exactly was done.
        bits_per_byte: cost in bits, ends of documents included, per byte of text.
        bytes: bytes of text scored.
        trained_bytes: bytes of text read before.
        seconds: how long it took.
    """

    name: str
    method: str
    bits_per_byte: float
    bytes: int
    trained_bytes: int
    seconds: float


def baselines(dataset: "PreparedDataset", split: str = "valid") -> list[Baseline]:
    """The baselines on a split of a dataset; computed once and kept in the dataset's directory.

    Args:
        dataset: a prepared dataset.
        split: the split to score; the train split is what is learnt from.

    Returns:
        The n-gram model, the compressor after the train split, the compressor alone.

    Cost: about 3 s and 0.5 GB for 11 MB of text.
    """
    made_from = _made_from(dataset, split)
    path = dataset.directory / CACHE
    known = _read_cache(path)
    for source, cached in known:
        if source == made_from:
            return cached
    train, text = split_bytes(dataset, "train"), split_bytes(dataset, split)
    found = [ngram_baseline(train, text), *compressor_baselines(train, text)]
    _write_cache(path, [*known, (made_from, found)])
    return found


def ngram_baseline(train: Sequence[bytes], text: Sequence[bytes], order: int = ORDER) -> Baseline:
    """An `NgramModel` of bytes counted on `train` and scored on `text`."""
    started = time.perf_counter()
    bits = NgramModel(order).fit(train).bits(text)
    method = "bytes, modified Kneser-Ney, counted on the train split"
    return _baseline(f"{order}-gram", method, bits, text, train, started)


def compressor_baselines(train: Sequence[bytes], text: Sequence[bytes]) -> list[Baseline]:
    """lzma after `train` (bytes of both minus bytes of `train`), and on `text` alone; one zero byte ends a document."""
    started = time.perf_counter()
    before, after = _joined(train), _joined(text)
    extra = len(_compress(before + after)) - len(_compress(before))
    method = "preset 9 extreme: size of train + split, minus size of train"
    given = _baseline("lzma after train", method, 8.0 * extra, text, train, started)
    started = time.perf_counter()
    alone = 8.0 * len(_compress(after))
    return [
        given,
        _baseline("lzma alone", "preset 9 extreme: the split without the train split", alone, text, [], started),
    ]


def split_bytes(dataset: "PreparedDataset", split: str, limit: int = MAX_BYTES) -> list[bytes]:
    """The texts of a split as UTF-8, decoded from its tokens; an even sample of them beyond `limit` bytes."""
    tokenizer = dataset.load_tokenizer()
    part = dataset.split(split)
    total = int(part.bytes.sum())
    wanted = None if total <= limit else max(1, len(part) * limit // total)
    texts, room = [], limit
    for index in spread(len(part), wanted):
        tokens = part.read(int(part.starts[index]), int(part.starts[index + 1]) - 1)
        text = str(tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)).encode()[:room]
        room -= len(text)
        texts.append(text)
    return texts


def _baseline(
    name: str, method: str, bits: float, text: Sequence[bytes], train: Sequence[bytes], started: float
) -> Baseline:
    size = sum(map(len, text))
    if not size:
        raise DataError("the split holds no text to measure; choose another split.")
    seconds = round(time.perf_counter() - started, 2)
    return Baseline(name, method, bits / size, size, sum(map(len, train)), seconds)


def _joined(documents: Sequence[bytes]) -> bytes:
    return b"".join(document + _END for document in documents)


def _compress(data: bytes) -> bytes:
    """lzma at its strongest; the dictionary holds all of the data and no more, which saves memory and nothing else."""
    options = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(len(data), 4096)}
    return lzma.compress(data, format=lzma.FORMAT_XZ, filters=[options])


def _made_from(dataset: "PreparedDataset", split: str) -> dict[str, object]:
    metadata = dataset.metadata
    return {
        "fingerprint": metadata.fingerprint,
        "valid_fraction": metadata.valid_fraction,
        "test_fraction": metadata.test_fraction,
        "text_field": metadata.text_field,
        "split": split,
        "version": _VERSION,
    }


_Cache = list[tuple[dict[str, object], list[Baseline]]]


def _read_cache(path: Path) -> _Cache:
    try:
        entries = json.loads(path.read_bytes())
        return [(entry["made_from"], [Baseline(**values) for values in entry["baselines"]]) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _write_cache(path: Path, entries: _Cache) -> None:
    content = [{"made_from": source, "baselines": [asdict(one) for one in found]} for source, found in entries]
    with contextlib.suppress(DataError):  # a dataset that cannot be written is computed anew each time
        _files.write_bytes(path, json.dumps(content, indent=2).encode() + b"\n")
