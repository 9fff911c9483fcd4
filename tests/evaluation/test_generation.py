"""Sampling: text piece by piece, stop strings, seeds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.tokenizers import byte_tokenizer
from farspan.errors import ConfigError, DataError
from farspan.evaluation.generation import IncrementalDecoder, Sampling, StopFilter, TextStream, sample_text
from tests.evaluation.tiny_evaluation import tiny_model

END, PADDING = 256, 257


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = tiny_model("metala").config
    config.vocab_size = len(tokenizer)
    return type(tiny_model("metala"))(config).eval()


@given(text=st.text(max_size=30))
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    decoder = IncrementalDecoder(byte_tokenizer().decode)
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert "".join(pieces) + decoder.flush() == text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


def test_bytes_that_are_no_character_come_out_as_replacement() -> None:
    decoder = IncrementalDecoder(byte_tokenizer().decode)
    pieces = [decoder.push(byte) for byte in b"a\xff\xc3b\xc3"]
    assert ("".join(pieces), decoder.flush()) == ("a\ufffd\ufffdb", "\ufffd")


def test_pieces_that_depend_on_their_neighbours() -> None:
    words = ["▁one", "▁two", "s"]  # a decoder that drops the first space, as SentencePiece does

    def decode(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    decoder = IncrementalDecoder(decode)
    assert [decoder.push(token) for token in (0, 1, 2, 0)] == ["one", " two", "s", " one"]


@given(text=st.text("ab\n", max_size=20), stops=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_stop_filter_gives_all_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream = StopFilter(stops)
    given_text, read = "", 0
    for character in text:
        if stream.found:
            break
        given_text += stream.push(character)
        read += 1
    given_text += stream.flush()
    places = [text.find(stop) for stop in stops if stop in text]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stream.found == bool(places)
    if places:
        assert read == min(ends)  # found as soon as the first one is complete
        assert text.startswith(given_text) and not any(stop in given_text for stop in stops)
    else:
        assert given_text == text


def test_stop_filter_holds_back_only_what_may_become_a_stop() -> None:
    stream = StopFilter(["\n\n", "END"])
    assert [stream.push(piece) for piece in ("abc\n", "d", "E", "N", "x", "\n", "\n")] == [
        "abc", "\nd", "", "", "ENx", "", "",
    ]  # fmt: skip
    assert stream.found and stream.flush() == "" and stream.push("more") == ""


def stream_of(tokens: list[int], stops: tuple[str, ...] = ()) -> TextStream:
    stream = TextStream(IncrementalDecoder(byte_tokenizer().decode), stops, END)
    for token in tokens:
        if not stream.complete:
            stream.push(token)
    stream.end()
    return stream


def test_stream_ends_with_the_document_or_a_stop() -> None:
    assert (stream_of([*b"hi", END]).text, stream_of([*b"hi", END]).complete) == ("hi", True)
    assert (stream_of([*b"hi"]).text, stream_of([*b"hi"]).complete) == ("hi", False)
    stopped = stream_of([*b"one\ntwo"], ("\n",))
    assert (stopped.text, stopped.complete, stopped.tokens) == ("one", True, 4)
    assert stream_of([*"né".encode()]).text == "né"


def test_same_seed_same_text(model, tokenizer) -> None:
    sampling = Sampling(max_new_tokens=20)
    pieces: list[str] = []
    before = torch.random.get_rng_state()
    first = sample_text(model, tokenizer, "def", seed=1, sampling=sampling, write=pieces.append)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = sample_text(model, tokenizer, "def", seed=1, sampling=sampling)
    other = sample_text(model, tokenizer, "def", seed=2, sampling=sampling)
    assert first.text == again.text == "".join(pieces) != other.text
    assert first.tokens <= 20 and first.prompt == "def" and first.seed == 1


def test_greedy_equals_argmax_with_and_without_cache(model, tokenizer) -> None:
    tokens = list(b"def f")
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    expected = tokenizer.decode(tokens[5:]).split(tokenizer.eos_token)[0]
    for cache in (True, False):
        greedy = Sampling(max_new_tokens=12, temperature=0, cache=cache)
        assert sample_text(model, tokenizer, "def f", sampling=greedy).text == expected


def test_empty_prompt_starts_a_document(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(model, "generate", lambda inputs, **_: seen.append(inputs.tolist()))
    sample_text(model, tokenizer, "")
    sample_text(model, tokenizer, "<|endoftext|>")
    assert seen == [[[END]], [list(b"<|endoftext|>")]]  # spelt out in a prompt it is ordinary text


def test_a_sample_cut_by_its_length_is_not_complete(model, tokenizer) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens equally likely: the first one, a zero byte, wins
    sample = sample_text(model, tokenizer, "x", sampling=Sampling(max_new_tokens=5, temperature=0))
    assert (sample.text, sample.complete, sample.tokens) == ("\0" * 5, False, 5)
    stopped = sample_text(model, tokenizer, "x", sampling=Sampling(temperature=0, stop=("\0\0\0",)))
    assert (stopped.text, stopped.complete, stopped.tokens) == ("", True, 3)


def test_refusals(model, tokenizer) -> None:
    with pytest.raises(DataError, match="5 tokens, longer than the 4 allowed"):
        sample_text(model, tokenizer, "12345", max_prompt_tokens=4)
    model.config.vocab_size = 50
    with pytest.raises(DataError, match="token 122, the model knows 50"):
        sample_text(model, tokenizer, "z")
    for name, value in (
        ("max_new_tokens", 0), ("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1),
        ("top_k", -1), ("stop", ("",)),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name}="):
            Sampling(**{name: value})
