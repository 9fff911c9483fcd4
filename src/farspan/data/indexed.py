"""Token files: the memory-mapped ``.bin``/``.idx`` pair of GPT-NeoX and Megatron.

``P.bin`` holds the token arrays of all items back to back. ``P.idx`` says where they are, all integers little endian:

=========  ======  ==================================================================================================
offset     bytes   content
=========  ======  ==================================================================================================
0          9       magic ``MMIDIDX`` and two zero bytes
9          8       uint64 version, 1
17         1       uint8 dtype code
18         8       uint64 N, number of items
26         8       uint64 M, number of entries of the document index
34         4·N     int32 size of each item in tokens
34+4N      8·N     int64 byte offset of each item in ``.bin``
34+12N     8·M     int64 document index: document k is the items ``document_index[k] .. document_index[k+1] - 1``
=========  ======  ==================================================================================================

Source: codefuse-ai/Collinear-Constrained-Attention: data/indexed_dataset.py.
"""

import contextlib
import os
import shutil
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from farspan.data._files import partial, publish, sync_directory, writing
from farspan.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("uint8", "int8", "int16", "int32", "int64", "float32", "float64", "uint16"), start=1)
}
_HEADER = struct.Struct("<9sQBQQ")
_UINT16_VOCABULARY = 65500
_LARGEST_ITEM = 2**31 - 1

PathLike: TypeAlias = str | os.PathLike[str]


def token_dtype(vocab_size: int | None) -> np.dtype:
    """The dtype in which tokens of a vocabulary are stored: uint16 below 65500 entries, else int32."""
    return DTYPES[8] if vocab_size is not None and vocab_size < _UINT16_VOCABULARY else DTYPES[4]


def bin_path(prefix: PathLike) -> Path:
    """``prefix.bin``; a prefix may contain dots."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: PathLike) -> Path:
    """``prefix.idx``."""
    return Path(f"{os.fspath(prefix)}.idx")


class IndexedWriter:
    """Writes a ``.bin``/``.idx`` pair; until `finalize` (or the end of the ``with`` block) nothing has its final name.

    Args:
        prefix: the pair's path without ``.bin`` and ``.idx``.
        dtype: one of the format's dtypes; see `token_dtype`.

    Raises:
        DataError: for another dtype, tokens that do not fit it, or a disk that is full.

    Example:
        >>> import tempfile; folder = tempfile.mkdtemp()
        >>> with IndexedWriter(f"{folder}/tiny", "uint16") as writer:
        ...     writer.add_item([1, 2, 3])
        ...     writer.end_document()
        >>> IndexedDataset(f"{folder}/tiny")[0].tolist()
        [1, 2, 3]
    """

    def __init__(self, prefix: PathLike, dtype: DTypeLike) -> None:
        self.prefix = Path(prefix)
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next((code for code, accepted in DTYPES.items() if accepted == self.dtype), 0)
        if not self._code:
            raise DataError(f"dtype {self.dtype} cannot be stored; accepted: {', '.join(map(str, DTYPES.values()))}.")
        self._sizes = array("i")
        self._document_index = array("q", [0])
        with writing(self._bin):
            self._bin.parent.mkdir(parents=True, exist_ok=True)
            self._file = partial(self._bin).open("wb")

    def add_item(self, tokens: ArrayLike) -> None:
        """Appends one item (of any size, 0 included) to the current document."""
        values = np.asarray(tokens)
        if values.ndim != 1:
            raise DataError(f"an item is a one-dimensional array of tokens; this one has shape {values.shape}.")
        if len(values) > _LARGEST_ITEM:
            raise DataError(f"an item holds at most {_LARGEST_ITEM} tokens; this one has {len(values)}. Split it.")
        stored = values.astype(self.dtype)
        if self.dtype.kind in "iu" and not np.array_equal(stored, values):
            raise DataError(
                f"tokens from {values.min()} to {values.max()} do not fit dtype {self.dtype}; "
                "store them as int32 (token_dtype picks by vocabulary size)."
            )
        with writing(self._bin):
            self._file.write(stored.tobytes())
        self._sizes.append(len(values))

    def end_document(self) -> None:
        """Ends the current document after the items added so far."""
        self._document_index.append(len(self._sizes))

    def add_document(self, tokens: ArrayLike) -> None:
        """Appends one document that is one item."""
        self.add_item(tokens)
        self.end_document()

    def merge(self, prefix: PathLike) -> None:
        """Appends all items and documents of another pair of the same dtype; a document begun before ends first.

        Note:
            The published code forgets the other file's document index; here it is carried over, shifted.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(f"{idx_path(prefix)} stores {other.dtype}, which cannot be merged into {self.dtype}.")
        first = len(self._sizes)
        if self._document_index[-1] != first:
            self.end_document()
        with writing(self._bin), bin_path(prefix).open("rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 22)
        self._sizes.frombytes(other.sizes.astype(np.int32).tobytes())
        self._document_index.frombytes((other.document_index[1:] + first).tobytes())

    def finalize(self) -> None:
        """Syncs both files to disk, then names them, the ``.idx`` last: the pair exists whole or not at all."""
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends])[: len(sizes)]
        documents = np.frombuffer(self._document_index, dtype=np.int64)
        with writing(self._bin):
            _sync_and_close(self._file)
        with writing(self._idx), partial(self._idx).open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(documents)))
            for part, dtype in ((sizes, "<i4"), (pointers, "<i8"), (documents, "<i8")):
                file.write(part.astype(dtype).tobytes())
            _sync_and_close(file)
        with writing(self._idx):
            self._idx.unlink(missing_ok=True)
            publish(self._bin)
            publish(self._idx)
            sync_directory(self._idx.parent)

    def abort(self) -> None:
        """Gives up: removes what has no final name yet."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()
        for path in (self._bin, self._idx):
            partial(path).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finalize()
        finally:
            self.abort()


class IndexedDataset:
    """Reads a ``.bin``/``.idx`` pair through memory maps; opening checks that the two agree.

    Args:
        prefix: the pair's path without ``.bin`` and ``.idx``.

    Attributes:
        dtype: dtype of the tokens.
        sizes: int32 `[items]`, tokens of each item.
        pointers: int64 `[items]`, byte offset of each item.
        document_index: int64 `[M]`; document k is the items ``document_index[k] .. document_index[k+1] - 1``.
        tokens: `[Σ sizes]`, all items back to back.

    Raises:
        DataError: when a file is missing, truncated, of another format, or contradicts the other.
    """

    def __init__(self, prefix: PathLike) -> None:
        self.prefix = Path(prefix)
        idx, data = idx_path(prefix), bin_path(prefix)
        for path in (idx, data):
            if not path.is_file():
                raise DataError(f"{path} does not exist; a token file is a pair of .bin and .idx.")
        self.dtype, items = _read_header(idx)
        index = np.memmap(idx, dtype=np.uint8, mode="r").view(np.ndarray)
        sizes_end = _HEADER.size + 4 * items
        pointers_end = sizes_end + 8 * items
        self.sizes: np.ndarray = index[_HEADER.size : sizes_end].view("<i4")
        self.pointers: np.ndarray = index[sizes_end:pointers_end].view("<i8")
        self.document_index: np.ndarray = index[pointers_end:].view("<i8")
        self._check(idx, data)
        self.tokens: np.ndarray = np.empty(0, self.dtype)
        if data.stat().st_size:
            self.tokens = np.memmap(data, dtype=self.dtype, mode="r").view(np.ndarray)

    def _check(self, idx: Path, data: Path) -> None:
        if (self.sizes < 0).any():
            raise DataError(f"{idx} is damaged: it gives item {int((self.sizes < 0).argmax())} a negative size.")
        ends = np.cumsum(self.sizes, dtype=np.int64) * self.dtype.itemsize
        wrong = self.pointers != np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
        if wrong.any():
            raise DataError(
                f"{idx} is damaged: the pointer of item {int(wrong.argmax())} contradicts the sizes before it."
            )
        documents = self.document_index
        if len(documents) == 0 or documents[0] != 0 or (np.diff(documents) < 0).any() or documents[-1] > len(ends):
            raise DataError(f"{idx} is damaged: its document index does not rise from 0 to at most {len(ends)} items.")
        needed, present = int(ends[-1]) if len(ends) else 0, data.stat().st_size
        if needed != present:
            raise DataError(
                f"{data} has {present} bytes but {idx.name} describes {needed}: one of them is truncated or belongs to "
                "another file. Prepare the data again."
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, item: int) -> np.ndarray:
        return self.get(item)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.get(item) for item in range(len(self)))

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[Path]]:
        return IndexedDataset, (self.prefix,)

    def get(self, item: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens ``offset .. offset + length - 1`` of an item, without copying.

        Args:
            item: number of the item; negative counts from the end.
            offset: first token, at most the item's size.
            length: number of tokens; None for all that follow.

        Raises:
            IndexError: when the item or the range does not exist.
        """
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} does not exist: {self.prefix} has {len(self)} items.")
        size = int(self.sizes[item])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                f"tokens {offset} to {offset + length} are not inside item {item}, which has {size} tokens."
            )
        start = int(self.pointers[item]) // self.dtype.itemsize + offset
        return self.tokens[start : start + length]

    @property
    def document_starts(self) -> np.ndarray:
        """int64 `[documents + 1]`: where each document starts in `tokens`, then where the last one ends."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes, dtype=np.int64)])
        return ends[self.document_index]


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """dtype and number of items of an ``.idx`` of the right length."""
    present = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if not MAGIC.startswith(head[: len(MAGIC)]) or not head:
        raise DataError(f"{path} is not an index of token files: it does not start with {MAGIC!r}.")
    if len(head) < _HEADER.size:
        raise DataError(f"{path} is truncated: it has {present} bytes, its header alone takes {_HEADER.size}.")
    _, version, code, items, documents = _HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"{path} has format version {version}; this reader knows version {VERSION}.")
    if code not in DTYPES:
        raise DataError(f"{path} has dtype code {code}; known codes are {min(DTYPES)} to {max(DTYPES)}.")
    needed = _HEADER.size + 12 * items + 8 * documents
    if needed != present:
        raise DataError(
            f"{path} has {present} bytes but its header ({items} items, {documents} document entries) needs {needed}."
        )
    return DTYPES[code], items


def _sync_and_close(file: object) -> None:
    file.flush()  # type: ignore[attr-defined]
    os.fsync(file.fileno())  # type: ignore[attr-defined]
    file.close()  # type: ignore[attr-defined]
