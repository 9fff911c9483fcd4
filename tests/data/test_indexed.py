"""Token files: the published bytes, round trips, merging, and every kind of damage."""

import errno
import itertools
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.index_maps import build_index_maps
from farspan.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path, token_dtype
from farspan.errors import ConfigError, DataError

Documents = list[list[list[int]]]
documents_of = st.lists(st.lists(st.lists(st.integers(0, 60_000), max_size=6), max_size=3), max_size=5)


def save(prefix: Path, documents: Documents, dtype: str = "uint16") -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            for item in document:
                writer.add_item(item)
            writer.end_document()
    return IndexedDataset(prefix)


@pytest.fixture
def mmap(golden_directory: Path) -> Path:
    folder = golden_directory / "coca" / "mmap"
    if not folder.is_dir():
        pytest.skip(f"no golden token files at {folder}")
    return folder


@pytest.mark.parametrize("name", ["tiny_uint16", "tiny_int32"])
def test_golden_files_are_read_and_written_byte_for_byte(mmap: Path, tmp_path: Path, name: str) -> None:
    expected = json.loads((mmap / "expected.json").read_text())[name]
    data = IndexedDataset(mmap / name)
    assert data.dtype == np.dtype(expected["dtype"])
    assert [item.tolist() for item in data] == expected["items"]
    assert data.sizes.tolist() == expected["sizes"]
    assert data.pointers.tolist() == expected["pointers"]
    assert data.document_index.tolist() == expected["doc_idx"]

    bounds = expected["doc_idx"]
    save(tmp_path / "copy", [expected["items"][a:b] for a, b in itertools.pairwise(bounds)], expected["dtype"])
    assert idx_path(tmp_path / "copy").read_bytes().hex() == expected["idx_hex"]
    assert idx_path(tmp_path / "copy").read_bytes() == idx_path(mmap / name).read_bytes()
    assert bin_path(tmp_path / "copy").read_bytes() == bin_path(mmap / name).read_bytes()


def test_golden_index_maps(mmap: Path) -> None:
    data = IndexedDataset(mmap / "tiny_uint16")
    for case in json.loads((mmap / "expected.json").read_text())["index_maps_tiny_uint16"]:
        maps = build_index_maps(
            data.sizes,
            np.arange(len(data)),
            sequence_length=case["seq_length"],
            num_samples=case["num_samples_requested"],
            seed=case["seed"],
        )
        assert maps.epochs == case["num_epochs"]
        assert maps.documents.tolist() == case["doc_idx"]
        assert maps.samples.tolist() == case["sample_idx"]
        assert maps.shuffle.tolist() == case["shuffle_idx"]
        assert [maps.read(data, index).tolist() for index in range(len(maps))] == case["samples"]
        assert len(maps) - 1 == case["reported_len"]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    st.integers(1, 7),
    st.integers(1, 20),
    st.integers(0, 9),
)
def test_index_maps_cut_the_shuffled_stream(sizes: list[int], length: int, count: int, seed: int) -> None:
    maps = build_index_maps(np.array(sizes), range(len(sizes)), sequence_length=length, num_samples=count, seed=seed)
    stream = [(int(item), offset) for item in maps.documents for offset in range(sizes[item])]
    assert len(maps) >= count
    assert sorted(maps.documents.tolist()) == sorted([*range(len(sizes))] * maps.epochs)
    for number, (row, offset) in enumerate(maps.samples.tolist()):
        assert stream[number * length] == (int(maps.documents[row]), offset)


def test_index_maps_refuse_nothing_to_sample() -> None:
    with pytest.raises(DataError, match="no token"):
        build_index_maps(np.array([0]), [0], sequence_length=4, num_samples=1, seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        build_index_maps(np.array([3]), [0], sequence_length=0, num_samples=1, seed=0)


@given(documents_of)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: Documents) -> None:
    data = save(tmp_path_factory.mktemp("data") / "a.b", documents)
    items = [item for document in documents for item in document]
    assert [item.tolist() for item in data] == items
    assert data.document_index.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert data.tokens.tolist() == [token for item in items for token in item]
    lengths = [sum(map(len, document)) for document in documents]
    assert np.diff(data.document_starts).tolist() == lengths
    assert [item.tolist() for item in pickle.loads(pickle.dumps(data))] == items


@given(documents_of, documents_of)
def test_merge_carries_the_document_index_over(
    tmp_path_factory: pytest.TempPathFactory, first: Documents, second: Documents
) -> None:
    folder = tmp_path_factory.mktemp("data")
    for name, documents in (("a", first), ("b", second), ("whole", first + second)):
        save(folder / name, documents)
    with IndexedWriter(folder / "merged", "uint16") as writer:
        writer.merge(folder / "a")
        writer.merge(folder / "b")
    for path in (idx_path, bin_path):
        assert path(folder / "merged").read_bytes() == path(folder / "whole").read_bytes()


def test_partial_reads_do_not_copy(tmp_path: Path) -> None:
    data = save(tmp_path / "a", [[[1, 2, 3, 4], [5, 6]]])
    assert data.get(0, 1, 2).tolist() == [2, 3]
    assert data.get(0, 3).tolist() == [4]
    assert data.get(1, 2).tolist() == []
    assert data[-1].tolist() == [5, 6]
    assert np.shares_memory(data.get(0, 1), data.tokens)
    for item, offset, length in ((2, 0, None), (-3, 0, None), (0, -1, 2), (0, 2, 3), (0, 5, None), (0, 1, -1)):
        with pytest.raises(IndexError):
            data.get(item, offset, length)


def test_dtype_follows_the_vocabulary() -> None:
    assert [token_dtype(size).name for size in (258, 65_499, 65_500, None)] == ["uint16", "uint16", "int32", "int32"]


@pytest.mark.parametrize(
    ("dtype", "tokens"), [("uint16", [65_536]), ("uint16", [-1]), ("uint16", [1.5]), ("int8", [128])]
)
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, dtype: str, tokens: list[float]) -> None:
    with pytest.raises(DataError, match="do not fit dtype"), IndexedWriter(tmp_path / "a", dtype) as writer:
        writer.add_item(tokens)
    assert not any(tmp_path.iterdir())


def test_bad_writes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be stored"):
        IndexedWriter(tmp_path / "a", "float16")
    with pytest.raises(DataError, match="shape"), IndexedWriter(tmp_path / "a", "int32") as writer:
        writer.add_item([[1]])
    save(tmp_path / "b", [[[1]]])
    with (
        pytest.raises(DataError, match="cannot be merged into int32"),
        IndexedWriter(tmp_path / "a", "int32") as writer,
    ):
        writer.merge(tmp_path / "b")


def test_nothing_has_its_name_before_it_is_whole(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", "uint16")
    writer.add_document([1, 2])
    assert not idx_path(tmp_path / "a").exists() and not bin_path(tmp_path / "a").exists()
    writer.finalize()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([3])
        raise RuntimeError
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [1, 2]


def test_full_disk_is_said_and_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", [[[1, 2]]])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(DataError, match="the disk is full"):
        patch.setattr(os, "fsync", full)
        save(tmp_path / "a", [[[3]]])
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def put(offset: int, form: str, value: int):
    """A change of the bytes of an ``.idx``."""

    def change(content: bytearray) -> bytearray:
        struct.pack_into(form, content, offset, value)
        return content

    return change


# The pair damaged below: two documents, items of 2, 3 and 1 tokens; sizes at 34, pointers at 46, document index at 70.
DAMAGED_INDEX = {
    "empty": (lambda content: content[:0], "does not start with"),
    "other magic": (lambda content: b"TNTIDX\0\0\0" + content[9:], "not an index of token files"),
    "cut in the header": (lambda content: content[:20], "is truncated"),
    "cut in the sizes": (lambda content: content[:40], "needs 94"),
    "cut at the end": (lambda content: content[:-8], "needs 94"),
    "too long": (lambda content: content + b"\0", "needs 94"),
    "version": (put(9, "<Q", 2), "format version 2"),
    "dtype code": (put(17, "<B", 9), "dtype code 9"),
    "dtype that is wider": (put(17, "<B", 4), "pointer of item 1 contradicts"),
    "dtype of the same width": (put(17, "<B", 3), None),
    "more items": (put(18, "<Q", 4), "needs 106"),
    "absurd number of items": (put(18, "<Q", 2**63), "needs"),
    "negative size": (put(34, "<i", -2), "item 0 a negative size"),
    "wrong size": (put(38, "<i", 7), "pointer of item 2 contradicts"),
    "wrong last size": (put(42, "<i", 9), "describes 28"),
    "wrong pointer": (put(54, "<q", 6), "pointer of item 1 contradicts"),
    "first pointer": (put(46, "<q", 2), "pointer of item 0 contradicts"),
    "document index starts late": (put(70, "<q", 1), "document index does not rise"),
    "document index falls": (put(78, "<q", -1), "document index does not rise"),
    "document index beyond the items": (put(86, "<q", 4), "document index does not rise"),
}


@pytest.mark.parametrize("case", DAMAGED_INDEX)
def test_an_index_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    change, message = DAMAGED_INDEX[case]
    save(tmp_path / "a", [[[1, 2], [3, 4, 5]], [[6]]])
    path = idx_path(tmp_path / "a")
    path.write_bytes(change(bytearray(path.read_bytes())))
    if message is None:
        assert IndexedDataset(tmp_path / "a").tokens.tolist() == [1, 2, 3, 4, 5, 6]
        return
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 11, 13, 100])
def test_a_bin_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    save(tmp_path / "a", [[[1, 2], [3, 4, 5]], [[6]]])
    bin_path(tmp_path / "a").write_bytes(bytes(length))
    with pytest.raises(DataError, match=f"has {length} bytes but a.idx describes 12"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("path", [idx_path, bin_path])
def test_a_missing_half_is_named(tmp_path: Path, path) -> None:
    save(tmp_path / "a", [[[1]]])
    path(tmp_path / "a").unlink()
    with pytest.raises(DataError, match=f"{path(tmp_path / 'a').name} does not exist"):
        IndexedDataset(tmp_path / "a")
