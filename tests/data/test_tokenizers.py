"""Tokenizers: exact round trips, loading without Farspan, determinism, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.tokenizers import (
    END_OF_DOCUMENT,
    PADDING,
    byte_tokenizer,
    document_encoder,
    end_of_document_id,
    load_tokenizer,
    pieces,
    tokenizer_hash,
    train_bpe,
)
from farspan.errors import ConfigError, DataError

TEXTS = ["def f(x):\n    return x + 1\n\n\ndef g(x):\n    return f(x)\n", "class A:\n    pass\n", "naïve café ⚡"] * 3
BYTE = byte_tokenizer()
BPE = train_bpe(TEXTS, 280)


@given(st.text(max_size=60))
def test_byte_tokens_are_the_bytes(text: str) -> None:
    assert BYTE(text).input_ids == list(text.encode())
    assert BYTE.decode(BYTE(text).input_ids) == text


@given(st.text(max_size=60))
def test_bpe_gives_back_every_text(text: str) -> None:
    assert BPE.decode(document_encoder(BPE)(text)) == text


@pytest.mark.parametrize("tokenizer", [BYTE, BPE])
def test_spaces_before_punctuation_survive(tokenizer) -> None:
    text = " a , b . do n't ' s  \n\t x ?!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("spec", ["byte", "bpe:280"])
def test_auto_tokenizer_loads_what_was_saved(tmp_path: Path, spec: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(spec, iter(TEXTS))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "\n".join(TEXTS)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.eos_token, loaded.pad_token) == (END_OF_DOCUMENT, PADDING)
    assert len(loaded) == len(tokenizer) == (258 if spec == "byte" else 280)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer(tmp_path))


def test_byte_vocabulary() -> None:
    assert len(BYTE) == 258
    assert (end_of_document_id(BYTE), BYTE.pad_token_id) == (256, 257)


def test_training_is_deterministic_and_of_the_size_asked_for() -> None:
    assert len(BPE) == 280
    assert train_bpe(iter(TEXTS), 280).backend_tokenizer.to_str() == BPE.backend_tokenizer.to_str()
    assert tokenizer_hash(train_bpe(TEXTS[:1], 280)) != tokenizer_hash(BPE)


@pytest.mark.parametrize("tokenizer", [BYTE, BPE])
def test_spelt_out_special_tokens_are_ordinary_text(tokenizer) -> None:
    text = f"a {END_OF_DOCUMENT} b {PADDING}"
    ids = document_encoder(tokenizer)(text)
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert tokenizer(END_OF_DOCUMENT).input_ids == [tokenizer.eos_token_id]  # the tokenizer itself is unchanged


@pytest.mark.parametrize("tokenizer", [BYTE, BPE])
@given(text=st.text(st.sampled_from("ab1_ .\n\r\té("), max_size=60), size=st.integers(1, 9))
def test_pieces_of_a_long_text_encode_like_the_whole(tokenizer, text: str, size: int) -> None:
    encode = document_encoder(tokenizer)
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert [token for part in parts for token in encode(part).tolist()] == encode(text).tolist()


def test_long_texts_are_cut_only_where_that_changes_nothing() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = "word\n" * 100_000
    assert len(list(pieces(text))) == 2
    vocabulary = {character: number for number, character in enumerate("▁word\nx")}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    prefixing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="x")
    assert (document_encoder(prefixing)(text) == vocabulary["▁"]).sum() == 1
    assert document_encoder(BYTE)(text).tolist() == list(text.encode())


def test_encoder_does_not_cut_off() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    ids = document_encoder(tokenizer)("longer than four")
    assert ids.dtype == np.int32
    assert ids.tolist() == list(b"longer than four")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("bytes", ConfigError, "use 'byte', 'bpe:N'"),
        ("bpe:", ConfigError, "use 'byte', 'bpe:N'"),
        ("bpe:many", ConfigError, "use 'byte', 'bpe:N'"),
        ("bpe:257", ConfigError, "use 258 or more"),
        ("bpe:300", ConfigError, "has to be trained"),
        ("no/such/directory", ConfigError, "path of a directory"),
        ("EMPTY", DataError, "holds no tokenizer"),
        ("DAMAGED", DataError, "holds no tokenizer"),
        ("ALIEN", DataError, "holds no tokenizer"),
        ("ENDLESS", DataError, "no end-of-sequence token"),
    ],
)
def test_bad_tokenizer_gets_one_clear_message(tmp_path: Path, spec: str, error: type[Exception], message: str) -> None:
    if spec.isupper():
        if spec != "EMPTY":
            byte_tokenizer().save_pretrained(tmp_path)
        if spec == "DAMAGED":
            (tmp_path / "tokenizer.json").write_text('{"version": ')
        if spec == "ALIEN":
            (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Other"}}')
        if spec == "ENDLESS":
            (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        spec = str(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load_tokenizer(spec)
    assert "\n" not in str(caught.value)
