"""Tokenizers: built-in bytes, a trained byte-level BPE, or any local Hugging Face tokenizer.

The two built here are plain `tokenizers` files: `AutoTokenizer.from_pretrained` loads what `save_pretrained` wrote
without Farspan. Both give back every UTF-8 text exactly.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from farspan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|pad|>"
_CUT = re.compile(r"(?<=[^\W_])\n")
SMALLEST_VOCABULARY = 258  # 256 bytes and the two tokens above
LARGEST_VOCABULARY = 2**31  # token files hold int32


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """The built-in tokenizer: token b is byte b, 256 ends a document, 257 pads.

    Example:
        >>> byte_tokenizer()("né").input_ids
        [110, 195, 169]
    """
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in enumerate(_byte_alphabet())}, []))
    return _byte_level(tokenizer, split_words=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: the training texts, read once.
        vocab_size: number of tokens, at least 258 (256 bytes, end of document, padding); fewer come out when the texts
            have not enough pairs to merge.

    Raises:
        ConfigError: when `vocab_size` is too small or too large.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    _check_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return _byte_level(tokenizer, split_words=True)


def load_tokenizer(spec: str | Path, texts: Iterable[str] | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer that `spec` asks for.

    Args:
        spec: ``byte``; ``bpe:N`` for a byte-level BPE of N tokens trained on `texts`; or the path of a directory with
            a Hugging Face tokenizer. Nothing is downloaded, no code of the directory runs.
        texts: training texts, needed by ``bpe:N`` alone.

    Raises:
        ConfigError: for a spec of none of these forms, or ``bpe:N`` without texts.
        DataError: for a directory that holds no usable tokenizer.
    """
    spec = str(spec)
    if spec == "byte":
        return byte_tokenizer()
    if (size := bpe_size(spec)) is not None:
        if texts is None:
            raise ConfigError(f"tokenizer {spec!r} has to be trained: give texts, or the directory of a trained one.")
        return train_bpe(texts, size)
    if not Path(spec).is_dir():
        raise ConfigError(
            f"tokenizer {spec!r} is not known: use 'byte', 'bpe:N' (for example 'bpe:4096') or the path of a directory "
            "with a Hugging Face tokenizer."
        )
    return _load_directory(Path(spec))


def bpe_size(spec: str) -> int | None:
    """N if `spec` asks for a BPE that has to be trained (``bpe:N``), None if not.

    Raises:
        ConfigError: when N is too small or too large.
    """
    if not re.fullmatch(r"bpe:\d+", spec):
        return None
    size = int(spec.removeprefix("bpe:"))
    _check_size(size)
    return size


def end_of_document_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends every document: the tokenizer's end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token (eos_token), which has to end every document.")
    return int(tokenizer.eos_token_id)


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A sha256 that is equal for tokenizers that map text to the same ids, and end documents alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{content}\0{tokenizer.eos_token_id}".encode()).hexdigest()


def document_encoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], np.ndarray]:
    """The function from a text to all of its ids (int32), for any number of threads; the tokenizer is not changed.

    No special tokens are added, nothing is cut off, and a special token spelt out in a text is ordinary text: an
    end-of-document id in the result would be a boundary that does not exist.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return lambda text: np.asarray(tokenizer(text, **options).input_ids, dtype=np.int32)
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True

    def encode(text: str) -> np.ndarray:
        # The form for batches is the one that runs outside Python's lock.
        return np.asarray(own.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int32)

    if encode("a\n\nb 1\n").tolist() != [*encode("a"), *encode("\n\nb 1"), *encode("\n")]:
        return encode
    return lambda text: np.concatenate([encode(piece) for piece in pieces(text)])


def pieces(text: str, size: int = 1 << 18) -> Iterator[str]:
    """A text in pieces of about `size` characters, since encoding takes a hundred times the memory of its text.

    Cuts lie between a letter or digit and an end of line: there, byte-level tokenizers start a new token whatever
    comes before or after, so the ids of the pieces are the ids of the text. Without such a place nothing is cut.
    """
    start = 0
    while cut := _CUT.search(text, start + size):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _check_size(size: int) -> None:
    if not SMALLEST_VOCABULARY <= size <= LARGEST_VOCABULARY:
        raise ConfigError(
            f"a byte-level BPE of {size} tokens is not possible; use {SMALLEST_VOCABULARY} or more, "
            f"at most {LARGEST_VOCABULARY}."
        )


def _byte_level(tokenizer: "Tokenizer", split_words: bool) -> "PreTrainedTokenizerFast":
    """Completes a byte-level model: byte pre-tokenizer and decoder, the two special tokens, the transformers class."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_DOCUMENT, PADDING])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_DOCUMENT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )


def _byte_alphabet() -> list[str]:
    """The printable character by which byte-level models of `tokenizers` write each of the 256 bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _load_directory(directory: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the readers below transformers raise the bare class for damaged files
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{directory} holds no tokenizer that transformers can load: {reason}") from error
    tokenizer.clean_up_tokenization_spaces = False
    end_of_document_id(tokenizer)
    return tokenizer
