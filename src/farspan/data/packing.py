"""Records to samples of fixed length: plain text, prompts with answers, or chats; padded, concatenated or packed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from farspan.data.corpora import DEFAULT_TEXT_FIELDS
from farspan.errors import ConfigError, DataError, nearest

Padding: TypeAlias = Literal["padding", "concat", "pack"]
Mode: TypeAlias = Literal["pretrain", "sft"]
ROLES = ("human", "bot", "system")
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One window of W tokens.

    Args:
        input_ids: int64 `[W]`.
        loss_mask: int64 `[W]`, 1 where the token is worth learning, 0 for prompts and padding.
        starts: int64, the places where a record starts; padding counts as a record.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    starts: np.ndarray

    def example(self, *, separate_documents: bool = True) -> dict[str, np.ndarray]:
        """Model input of W − 1 positions: `input_ids`, aligned `labels` (-100 outside the loss), `position_ids`.

        Args:
            separate_documents: positions restart at every record, and no record's first token is a label. Positions
                that restart are where the model keeps records apart.
        """
        labels = np.where(self.loss_mask[1:] == 1, self.input_ids[1:], IGNORED)
        positions = np.arange(len(labels))
        if separate_documents:
            labels[self.starts[self.starts > 0] - 1] = IGNORED
            begins = np.unique(np.append(self.starts[self.starts < len(labels)], 0))
            positions -= np.repeat(begins, np.diff(np.append(begins, len(labels))))
        return {"input_ids": self.input_ids[:-1], "labels": labels, "position_ids": positions}


@dataclass
class PackingReport:
    """What became of the records so far; ``padding`` counts tokens."""

    records: int = 0
    samples: int = 0
    dropped_records: int = 0
    dropped_tokens: int = 0
    padding: int = 0

    def __str__(self) -> str:
        return (
            f"{self.records} records made {self.samples} samples with {self.padding} tokens of padding; "
            f"{self.dropped_records} records too long and {self.dropped_tokens} tokens in all were dropped"
        )


class SampleEncoder:
    """Turns records into samples of `window` tokens.

    A record is one of

    - ``{"text": ...}`` (or ``content``, or `text_field`): the text, then the end of document;
    - ``{"prompt": ..., "answer": ...}``, optionally ``"system"``: in mode ``sft`` each part follows its marker
      ``<|role_start|>human<|role_end|>`` (system, human, bot), and only the answer and the end of document are learnt;
    - ``{"chat_rounds": [{"role": "human", "content": ...}, ...]}``: likewise, with an end of document after every bot
      round, and only the bot's rounds are learnt.

    Mode ``pretrain`` uses no markers and learns everything. The padding modes are

    - ``padding``: one sample per record, padded on the right; longer records are dropped;
    - ``concat``: records laid end to end, cut every ``window - 1`` tokens, so neighbours share one token;
    - ``pack``: as many whole records as fit, padded on the right; longer records are dropped.

    What is dropped is counted in `report`.

    Args:
        encode: from text to ids, without special tokens (see `tokenizers.document_encoder`).
        end_of_document: id after each document.
        pad: id for padding.
        window: tokens per sample, W; a model reads W − 1 of them.
        padding: padding mode.
        mode: ``pretrain`` or ``sft``.
        text_field: field that holds a plain text; None takes ``text``, or else ``content``.
        keep_tail: whether the last, partly filled window is padded and emitted; False drops it.
        clean: whether `clean_text` is applied to every text first.

    Raises:
        ConfigError: for modes and sizes that are not accepted.

    Note:
        The published encoder takes W = sequence_length + 1 for raw and W = sequence_length for tokenised data, always
        cleans, and loses the tail (``clean=True, keep_tail=False``); its concat mode fails on tokenised data. It never
        separates records (``example(separate_documents=False)``).

    Source: codefuse-ai/Collinear-Constrained-Attention: data/tokenization/preprocess_data.py.

    Example:
        >>> encoder = SampleEncoder(lambda text: [ord(c) for c in text], end_of_document=1, pad=0, window=6)
        >>> [sample.input_ids.tolist() for sample in encoder.samples([{"text": "a"}, {"text": "bc"}])]
        [[97, 1, 98, 99, 1, 0]]
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[int] | np.ndarray],
        *,
        end_of_document: int,
        pad: int,
        window: int,
        padding: Padding = "pack",
        mode: Mode = "pretrain",
        text_field: str | None = None,
        keep_tail: bool = True,
        clean: bool = False,
    ) -> None:
        for name, value, accepted in (("padding", padding, get_args(Padding)), ("mode", mode, get_args(Mode))):
            if value not in accepted:
                raise ConfigError(f"{name}={value!r} is not accepted; {nearest(value, accepted)}")
        if window < 2:
            raise ConfigError(f"window={window} is not accepted; it has to be at least 2 (one input and one label).")
        self.encode = encode
        self.end_of_document = end_of_document
        self.pad = pad
        self.window = window
        self.padding = padding
        self.mode = mode
        self.text_fields = (text_field,) if text_field else DEFAULT_TEXT_FIELDS
        self.keep_tail = keep_tail
        self.clean = clean
        self.report = PackingReport()
        self._pending = np.zeros((3, 0), dtype=np.int64)  # rows: ids, loss mask, 1 where a record starts
        self._fresh = False  # whether something pending was not emitted yet

    @property
    def tail(self) -> np.ndarray:
        """Ids that wait for their window to fill."""
        return self._pending[0]

    def samples(self, records: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
        """All samples of `records`, the tail included if `keep_tail`."""
        for record in records:
            yield from self.add(record)
        yield from self.finish()

    def add(self, record: Mapping[str, Any]) -> list[Sample]:
        """The samples that this record completes.

        Raises:
            DataError: for a record of another form.
        """
        if not isinstance(record, Mapping):
            raise DataError(f"a record has to be an object with named fields; this one is {record!r:.80}.")
        encoded = self._encode_record(record)
        self.report.records += 1
        if not encoded.size:
            return []
        if self.padding == "concat":
            return self._concatenate(encoded)
        length = encoded.shape[1]
        if length > self.window:
            self.report.dropped_records += 1
            self.report.dropped_tokens += length
            return []
        if self.padding == "padding":
            return [self._emit(encoded)]
        full = []
        if self._pending.shape[1] + length > self.window:
            full.append(self._emit(self._pending))
            self._pending = self._pending[:, :0]
        self._pending = np.concatenate([self._pending, encoded], axis=1)
        self._fresh = True
        return full

    def finish(self) -> list[Sample]:
        """Ends the data: the padded tail, or nothing if it is to be dropped."""
        pending, fresh = self._pending, self._fresh
        self._pending, self._fresh = pending[:, :0], False
        if not fresh:
            return []
        if self.keep_tail:
            return [self._emit(pending)]
        self.report.dropped_tokens += pending.shape[1]
        return []

    def _concatenate(self, encoded: np.ndarray) -> list[Sample]:
        pending = np.concatenate([self._pending, encoded], axis=1)
        fresh = True
        full = []
        while pending.shape[1] >= self.window:
            full.append(self._emit(pending[:, : self.window]))
            pending = pending[:, self.window - 1 :]
            fresh = pending.shape[1] > 1
        self._pending, self._fresh = pending, fresh
        return full

    def _emit(self, encoded: np.ndarray) -> Sample:
        missing = self.window - encoded.shape[1]
        filler = np.zeros((3, missing), dtype=np.int64)
        filler[0] = self.pad
        filler[2, :1] = 1
        ids, mask, begins = np.concatenate([encoded, filler], axis=1)
        self.report.samples += 1
        self.report.padding += missing
        return Sample(ids, mask, np.flatnonzero(begins))

    def _encode_record(self, record: Mapping[str, Any]) -> np.ndarray:
        """int64 `[3, n]`: ids, loss mask, 1 where the record starts."""
        ids: list[int] = []
        mask: list[int] = []
        for text, learnt, ended in self._parts(record):
            part = [*self._encode(text), *([self.end_of_document] if ended else [])]
            ids += part
            mask += [int(learnt or self.mode == "pretrain")] * len(part)
        encoded = np.zeros((3, len(ids)), dtype=np.int64)
        encoded[0], encoded[1] = ids, mask
        encoded[2, :1] = 1
        return encoded

    def _parts(self, record: Mapping[str, Any]) -> Iterator[tuple[str, bool, bool]]:
        """(text, whether it is learnt, whether the document ends after it) for each part of a record."""
        field = next((field for field in self.text_fields if field in record), None)
        if field is not None:
            yield _string(record, field), True, True
        elif "prompt" in record and "answer" in record:
            if "system" in record:
                yield from self._turn("system", _string(record, "system"))
            yield from self._turn("human", _string(record, "prompt"))
            yield from self._turn("bot", _string(record, "answer"))
        elif "chat_rounds" in record:
            turns = record["chat_rounds"]
            for turn in turns if isinstance(turns, list | tuple) else [turns]:
                if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
                    raise DataError(
                        f"a chat round has to be an object with 'role' and 'content'; this one is {turn!r}."
                    )
                if turn["role"] not in ROLES:
                    raise DataError(
                        f"role {turn['role']!r} of a chat round is not known; {nearest(str(turn['role']), ROLES)}"
                    )
                yield from self._turn(turn["role"], _string(turn, "content"))
        else:
            wanted = " or ".join(map(repr, self.text_fields))
            raise DataError(
                f"a record needs {wanted}, or 'prompt' and 'answer', or 'chat_rounds'; this one has: "
                f"{', '.join(record) or 'nothing'}."
            )

    def _turn(self, role: str, content: str) -> Iterator[tuple[str, bool, bool]]:
        if self.mode == "sft":
            yield f"<|role_start|>{role}<|role_end|>", False, False
        yield content, role == "bot", role == "bot"

    def _encode(self, text: str) -> list[int]:
        ids = self.encode(clean_text(text) if self.clean else text)
        return [int(token) for token in ids]


def clean_text(text: str) -> str:
    """No-break spaces become spaces; full-width digits and punctuation become ASCII."""
    return text.translate(_CLEANED)


_CLEANED = {0x00A0: " ", 0x202F: " ", 0x3000: " "} | {
    code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if not chr(code - 0xFEE0).isalpha()
}


def _string(record: Mapping[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"field {field!r} of a record holds a {type(value).__name__}, not a string.")
    return value
