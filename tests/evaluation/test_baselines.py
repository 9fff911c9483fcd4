"""The baselines: what they count, and that they are computed once."""

import lzma
from pathlib import Path

import pytest

from farspan.data.prepare import prepare
from farspan.errors import DataError
from farspan.evaluation import baselines as module
from farspan.evaluation.baselines import CACHE, baselines, compressor_baselines, ngram_baseline, split_bytes
from farspan.evaluation.ngram import NgramModel

TEXTS = [f"def f{i}(x):\n    return x + {i}  # é\n" * (i % 5 + 1) for i in range(40)]


@pytest.fixture
def dataset(tmp_path: Path):
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "corpus" / f"{number}.py").write_text(text, encoding="utf-8")
    return prepare(tmp_path / "corpus", "byte", tmp_path / "data", valid=0.3, test=0.1, progress=False)


def test_split_bytes_are_the_texts(dataset) -> None:
    found = split_bytes(dataset, "train") + split_bytes(dataset, "valid") + split_bytes(dataset, "test")
    assert sorted(found) == sorted(text.encode() for text in TEXTS)


def test_split_bytes_of_a_large_split_are_an_even_sample(dataset) -> None:
    whole = split_bytes(dataset, "train")
    limit = sum(map(len, whole)) // 2
    sample = split_bytes(dataset, "train", limit)
    assert len(sample) == len(whole) // 2
    assert 0 < sum(map(len, sample)) <= limit
    assert sample != whole[: len(sample)]


def test_ngram_baseline_counts_the_bytes_of_the_text_alone() -> None:
    found = ngram_baseline([b"abab"], [b"ab", b"ba"], order=2)
    assert (found.bytes, found.trained_bytes) == (4, 4)
    assert found.bits_per_byte == NgramModel(2).fit([b"abab"]).bits([b"ab", b"ba"]) / 4


def test_compressor_baselines_are_differences_of_sizes() -> None:
    train, text = [b"hello world, " * 30] * 3, [b"hello there, " * 20]
    after, alone = compressor_baselines(train, text)

    def size(documents: list[bytes]) -> int:
        return len(lzma.compress(b"".join(d + b"\0" for d in documents), preset=9 | lzma.PRESET_EXTREME))

    assert after.bits_per_byte == 8 * (size(train + text) - size(train)) / len(text[0])
    assert alone.bits_per_byte == 8 * size(text) / len(text[0])
    assert (after.trained_bytes, alone.trained_bytes) == (3 * 13 * 30, 0)


def test_computed_once_and_again_when_the_text_is_another(dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = baselines(dataset)
    assert [one.name for one in first] == ["6-gram", "lzma after train", "lzma alone"]
    other = baselines(dataset, "test")
    assert other[0].bytes != first[0].bytes

    def counted(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "ngram_baseline", counted)
    assert baselines(dataset) == first
    assert baselines(dataset, "test") == other
    (dataset.directory / CACHE).write_text("[{]")  # damaged: computed again
    with pytest.raises(AssertionError, match="computed again"):
        baselines(dataset)


def test_a_directory_that_cannot_be_written_still_answers(dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DataError("the disk is full")

    monkeypatch.setattr(module._files, "write_bytes", full)
    assert len(baselines(dataset)) == 3
    assert not (dataset.directory / CACHE).exists()


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        ngram_baseline([b"a"], [b""])
