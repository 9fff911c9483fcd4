"""Preparing a corpus: what comes out, going on after a stop, a full disk, and what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farspan.data import _staging
from farspan.data import prepare as prepare_module
from farspan.data.corpora import SPLITS, Fractions, open_corpus
from farspan.data.dataset import Metadata, PreparedDataset, open_dataset
from farspan.data.indexed import IndexedWriter
from farspan.data.prepare import prepare
from farspan.errors import ConfigError, DataError


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_document_comes_back_in_its_split(dataset: PreparedDataset, corpus_directory: Path) -> None:
    corpus = open_corpus(corpus_directory, fractions=Fractions(0.1, 0.1))
    tokenizer = dataset.load_tokenizer()
    for split in SPLITS:
        texts = [document.text for document in corpus.documents(split) if document.text]
        documents = list(dataset.documents(split))
        assert [tokenizer.decode(document.tokens[:-1]) for document in documents] == texts
        assert all(document.tokens[-1] == dataset.metadata.end_of_document for document in documents)
        assert [document.bytes for document in documents] == [len(text.encode()) for text in texts]
        counts = dataset.metadata.splits[split]
        assert counts.documents == len(texts)
        assert counts.bytes == sum(document.bytes for document in documents)
        assert counts.tokens == sum(len(document.tokens) for document in documents)
    assert dataset.metadata.fingerprint == corpus.fingerprint
    assert dataset.metadata.dtype == "uint16"


def test_directory_holds_exactly_the_dataset(dataset: PreparedDataset) -> None:
    expected = {"dataset.json", "tokenizer"} | {
        f"{split}.{ending}" for split in SPLITS for ending in ("bin", "idx", "bytes.npy")
    }
    assert {path.name for path in dataset.directory.iterdir()} == expected
    assert [path.name for path in dataset.directory.parent.iterdir()] == [dataset.directory.name]


def test_result_does_not_depend_on_workers_and_shards(corpus_directory: Path, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {"workers": 1},
        {"workers": 3, "shard_bytes": 300},
        {"workers": 2, "shard_bytes": 1},
    ]
    results = [
        contents(prepare(corpus_directory, "bpe:300", tmp_path / str(number), **option).directory)
        for number, option in enumerate(options)
    ]
    assert results[0] == results[1] == results[2]


def test_lines_of_a_jsonl_are_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"body": f"document {number}\n"}) for number in range(50)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    dataset = prepare(tmp_path / "all.jsonl", "byte", tmp_path / "out", text_field="body", valid=0.2, test=0.2)
    assert sum(counts.documents for counts in dataset.metadata.splits.values()) == 50
    assert all(counts.documents > 2 for counts in dataset.metadata.splits.values())
    assert dataset.load_tokenizer().decode(next(dataset.documents("valid")).tokens[:9]) == "document "


def test_skipped_files_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    dataset = prepare(tmp_path, "byte", tmp_path / ".out", valid=0, test=0)
    assert dataset.metadata.skipped_files == 1
    assert "1 files are not UTF-8 and are left out (first: bad.txt)" in caplog.text


def test_bpe_is_trained_on_the_train_split_only(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(30):
        train = Fractions().split_of(f"{number}.txt") == "train"
        (corpus / f"{number}.txt").write_text("aaaa " * 20 if train else "zzzz " * 20)
    vocabulary = prepare(corpus, "bpe:300", tmp_path / "out").load_tokenizer().get_vocab()
    assert "aa" in vocabulary and "zz" not in vocabulary


def test_second_run_returns_at_once(dataset: PreparedDataset, corpus_directory: Path, monkeypatch: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.directory.iterdir()}
    monkeypatch.setattr(prepare_module, "_build", None)
    again = prepare(corpus_directory, "byte", dataset.directory, valid=0.1, test=0.1)
    assert again.metadata == dataset.metadata
    assert before == {path: path.stat().st_mtime_ns for path in dataset.directory.iterdir()}


def test_large_corpora_train_the_bpe_on_an_even_sample(corpus_directory: Path, monkeypatch: Any) -> None:
    corpus = open_corpus(corpus_directory)
    everything = list(prepare_module._training_texts(corpus))
    monkeypatch.setattr(prepare_module, "BPE_TRAINING_BYTES", corpus.scan.bytes // 3)
    sample = list(prepare_module._training_texts(corpus))
    assert 0 < len(sample) < 0.6 * len(everything)
    assert sample == list(prepare_module._training_texts(corpus))


def stop_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the run stop when it begins the shard after `shards` of them; returns the names of those it begins."""
    begun: list[str] = []

    class Stopping(IndexedWriter):
        def __init__(self, prefix: Any, dtype: Any) -> None:
            begun.append(Path(prefix).name)
            if len(begun) > shards:
                raise KeyboardInterrupt
            super().__init__(prefix, dtype)

    monkeypatch.setattr(prepare_module, "IndexedWriter", Stopping)
    return begun


@pytest.mark.parametrize("shards", [1, 4])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    corpus_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    whole = prepare(corpus_directory, "bpe:280", tmp_path / "whole", shard_bytes=3000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(shards, patch)
        prepare(corpus_directory, "bpe:280", tmp_path / "out", shard_bytes=3000)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "out")
    with monkeypatch.context() as patch:
        begun = stop_after(1000, patch)
        finished = prepare(corpus_directory, "bpe:280", tmp_path / "out", shard_bytes=3000)
    done_before = [f"train-{number:05d}" for number in range(shards)]
    assert not set(done_before) & set(begun)
    assert contents(finished.directory) == contents(whole.directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_work_on_other_inputs_is_not_mixed_in(
    corpus_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        prepare(corpus_directory, "bpe:280", tmp_path / "out", shard_bytes=3000)
    found = prepare(corpus_directory, "byte", tmp_path / "out", shard_bytes=3000)
    fresh = prepare(corpus_directory, "byte", tmp_path / "fresh", shard_bytes=3000)
    assert contents(found.directory) == contents(fresh.directory)


def test_kill_9_loses_nothing_that_was_finished(corpus_directory: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from farspan.data import prepare as p\n"
        "class Dying(p.IndexedWriter):\n"
        "    def finalize(self):\n"
        "        if self.prefix.name == 'train-00002': os.kill(os.getpid(), signal.SIGKILL)\n"
        "        super().finalize()\n"
        "p.IndexedWriter = Dying\n"
        "p.prepare(sys.argv[1], 'byte', sys.argv[2], shard_bytes=2000)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", script, str(corpus_directory), str(out)], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    kept = {path.name for path in (tmp_path / ".out.preparing").glob("*.idx")}
    assert kept == {"train-00000.idx", "train-00001.idx"}
    assert not out.exists()
    finished = prepare(corpus_directory, "byte", out, shard_bytes=2000)
    assert contents(finished.directory) == contents(prepare(corpus_directory, "byte", tmp_path / "fresh").directory)


def full_disk(monkeypatch: pytest.MonkeyPatch, syncs: int) -> None:
    """The disk is full from the call after `syncs` syncs on."""
    count = iter(range(10**9))
    sync = os.fsync

    def full(descriptor: int) -> None:
        if next(count) >= syncs:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("syncs", [0, 1, 2, 5, 9, 14])
def test_full_disk_is_said_and_loses_nothing(
    corpus_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: int
) -> None:
    out = tmp_path / "out"
    earlier = contents(prepare(corpus_directory, "bpe:280", out).directory)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="the disk is full") as caught:
        full_disk(patch, syncs)
        prepare(corpus_directory, "byte", out, overwrite=True, shard_bytes=20_000)
    assert "\n" not in str(caught.value)
    assert contents(open_dataset(out).directory) == earlier
    assert prepare(corpus_directory, "byte", out, overwrite=True, shard_bytes=20_000).metadata.tokenizer == "byte"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_inputs_need_overwrite(corpus_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(corpus_directory, "byte", out)
    before = contents(out)
    for changed, message in (
        ({"tokenizer": "bpe:280"}, "tokenizer byte instead of bpe:280"),
        ({"valid": 0.2}, "valid_fraction 0.05 instead of 0.2"),
        ({"text_field": "body"}, "text_field None instead of body"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(**{"corpus": corpus_directory, "tokenizer": "byte", "out": out, **changed})
    assert contents(out) == before
    assert prepare(corpus_directory, "bpe:280", out, overwrite=True).metadata.vocab_size == 280


@pytest.mark.parametrize("step", ["before", "between", "after"])
def test_a_stop_while_replacing_keeps_one_whole_dataset(
    corpus_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = tmp_path / "out"
    prepare(corpus_directory, "bpe:280", out)
    replace: Callable[..., None] = os.replace

    def stopping(source: Path, target: Path) -> None:
        installing = Path(source).name == ".out.preparing"
        if (step == "before" and Path(source) == out) or (step == "between" and installing):
            raise KeyboardInterrupt
        replace(source, target)
        if step == "after" and installing:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_staging.os, "replace", stopping)
        prepare(corpus_directory, "byte", out, overwrite=True)
    wanted = "byte" if step == "after" else "bpe:280"
    assert prepare(corpus_directory, wanted, out).metadata.tokenizer == wanted
    assert prepare(corpus_directory, "byte", out, overwrite=True).metadata.tokenizer == "byte"
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


def test_two_processes_do_not_prepare_the_same_place(corpus_directory: Path, tmp_path: Path) -> None:
    with _staging.locked(tmp_path / "out"), pytest.raises(DataError, match="another process is preparing"):
        prepare(corpus_directory, "byte", tmp_path / "out")
    prepare(corpus_directory, "byte", tmp_path / "out")


def empty_out(out: Path) -> None:
    out.mkdir()


def file_in_the_way(out: Path) -> None:
    out.write_text("mine")


def other_files(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


def parent_is_a_file(out: Path) -> None:
    out.parent.rmdir()
    out.parent.write_text("mine")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (file_in_the_way, "is not a prepared dataset; it is left alone"),
        (other_files, "is not a prepared dataset; it is left alone"),
        (parent_is_a_file, "cannot write"),
    ],
)
def test_nothing_else_is_replaced(
    corpus_directory: Path, tmp_path: Path, place: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()
    place(out)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(corpus_directory, "byte", out, overwrite=True)
    assert contents(tmp_path) == before


def test_an_empty_directory_may_be_filled(corpus_directory: Path, tmp_path: Path) -> None:
    empty_out(tmp_path / "out")
    assert prepare(corpus_directory, "byte", tmp_path / "out").metadata.splits["train"].documents


def test_bad_requests_leave_nothing_behind(corpus_directory: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "lonely.txt"
    lonely.write_text("one document only")
    out = tmp_path / "out"
    attempts: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "workers=0", {"workers": 0}),
        (ConfigError, "shard_bytes=0", {"shard_bytes": 0}),
        (ConfigError, "split fractions", {"valid": 1.0}),
        (ConfigError, "use 258 or more", {"tokenizer": "bpe:3"}),
        (ConfigError, "is not known", {"tokenizer": "nothing"}),
        (DataError, "neither a path", {"corpus": "nothing"}),
        (DataError, "no text in its train split", {"corpus": lonely, "valid": 0.99, "test": 0.0}),
    ]
    for error, message, options in attempts:
        with pytest.raises(error, match=message):
            prepare(**{"corpus": corpus_directory, "tokenizer": "byte", "out": out, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["lonely.txt"]


def test_an_empty_split_is_said_when_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one document only")
    dataset = prepare(tmp_path / "one.txt", "byte", tmp_path / "out", valid=0, test=0)
    assert dataset.metadata.splits["valid"].documents == 0
    with pytest.raises(DataError, match=r"the valid split of .* is empty"):
        list(dataset.documents("valid"))
    with pytest.raises(DataError, match="did you mean 'train'"):
        dataset.split("trian")


@pytest.fixture
def copy(dataset: PreparedDataset, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(dataset.directory, tmp_path / "copy")
    yield tmp_path / "copy"


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, "does not exist"),
    "no metadata": (lambda copy: (copy / "dataset.json").unlink(), "has no dataset.json"),
    "no tokenizer": (lambda copy: shutil.rmtree(copy / "tokenizer"), "tokenizer missing"),
    "two files gone": (
        lambda copy: [(copy / name).unlink() for name in ("valid.bin", "test.bytes.npy")],
        "valid.bin, test.bytes.npy missing",
    ),
    "metadata is not json": (lambda copy: (copy / "dataset.json").write_text("{"), "dataset.json is damaged"),
    "metadata is a list": (lambda copy: (copy / "dataset.json").write_text("[]"), "dataset.json is damaged"),
    "metadata misses a field": (lambda copy: (copy / "dataset.json").write_text('{"format": 1}'), "is damaged"),
    "metadata of the future": (lambda copy: (copy / "dataset.json").write_text('{"format": 9}'), "has layout 9"),
    "bin cut": (lambda copy: os.truncate(copy / "train.bin", 100), "has 100 bytes but train.idx describes"),
    "idx of another split": (
        lambda copy: shutil.copy(copy / "valid.idx", copy / "train.idx"),
        "belongs to another file",
    ),
    "other split whole": (
        lambda copy: [shutil.copy(copy / f"valid.{end}", copy / f"train.{end}") for end in ("bin", "idx")],
        "dataset.json promises",
    ),
    "byte lengths cut": (
        lambda copy: os.truncate(copy / "train.bytes.npy", 200),
        "train.bytes.npy is missing or damaged",
    ),
    "byte lengths empty": (
        lambda copy: os.truncate(copy / "train.bytes.npy", 0),
        "train.bytes.npy is missing or damaged",
    ),
    "byte lengths pickled": (
        lambda copy: np.save(copy / "train.bytes.npy", np.array([{}], dtype=object)),
        "train.bytes.npy is missing or damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_dataset_gets_one_clear_message(copy: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(copy)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(copy).split("train")
    assert "\n" not in str(caught.value)


def test_metadata_round_trip(dataset: PreparedDataset, tmp_path: Path) -> None:
    dataset.metadata.save(tmp_path)
    assert Metadata.load(tmp_path) == dataset.metadata
