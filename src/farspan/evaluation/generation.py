"""Sampling text from a model, piece by piece: whole characters only, and never a stop string."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from farspan.data.tokenizers import document_encoder, end_of_document_id
from farspan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from farspan.models import FarspanForCausalLM
    from farspan.models.decoding import Choice

_REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are not a character (yet)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample.

    Args:
        max_new_tokens: tokens to generate at most.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this probability, in (0, 1].
        top_k: sample from so many of the likeliest tokens; 0 does not limit them.
        stop: texts at which to stop; they are not part of the sample.
        cache: whether to decode with the model's memory; without it every token reads the whole text again.

    Raises:
        ConfigError: for values out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    stop: tuple[str, ...] = ()
    cache: bool = True

    def __post_init__(self) -> None:
        for name, accepted, text in (
            ("max_new_tokens", self.max_new_tokens >= 1, "whole numbers from 1"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not accepted; accepted are {text}.")
        self.choice()

    def choice(self) -> "Choice":
        """How one token is chosen, checked."""
        from farspan.models.decoding import Choice

        return Choice(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Sample:
    """One generated text.

    Attributes:
        prompt: what it continues.
        seed: seed it was sampled with.
        text: the text, without prompt and stop string.
        complete: whether it ended by itself (end of document or a stop string), not by `max_new_tokens`.
        tokens: number of generated tokens.
        seconds: how long it took, reading the prompt included.
    """

    prompt: str
    seed: int
    text: str
    complete: bool
    tokens: int
    seconds: float


def sample_text(
    model: "FarspanForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str = "",
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
    max_prompt_tokens: int | None = None,
    write: Callable[[str], None] | None = None,
) -> Sample:
    """Continues a prompt; the same seed gives the same text on the same machine.

    On a GPU, models whose memory has a constant size decode in a captured loop (`farspan.models.decoding`), others by
    `generate` of transformers.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        prompt: the text to continue; "" starts a new document.
        seed: seed of the sampling; the global generators are left as they were.
        sampling: how to sample.
        max_prompt_tokens: refuse longer prompts; None takes any length.
        write: called with each piece of text as soon as it is certain.

    Returns:
        The sample.

    Raises:
        DataError: when the prompt is longer than allowed, or has tokens the model does not know.
    """
    from transformers import GenerationConfig

    from farspan.models.decoding import capture_reason, decode, on_host

    sampling = sampling or Sampling()
    end = end_of_document_id(tokenizer)
    tokens = document_encoder(tokenizer)(prompt).tolist() if prompt else [end]
    if max_prompt_tokens is not None and len(tokens) > max_prompt_tokens:
        raise DataError(
            f"the prompt has {len(tokens)} tokens, longer than the {max_prompt_tokens} allowed; shorten it."
        )
    if max(tokens) >= model.config.vocab_size:
        raise DataError(
            f"the prompt has token {max(tokens)}, the model knows {model.config.vocab_size} tokens: "
            "the tokenizer is not the one it was trained with."
        )
    samples = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=samples,
        temperature=sampling.temperature if samples else None,
        top_p=sampling.top_p if samples else None,
        top_k=sampling.top_k if samples else None,
        use_cache=sampling.cache,
        eos_token_id=end,
        pad_token_id=end,
    )
    stream = TextStream(IncrementalDecoder(tokenizer.decode), sampling.stop, end, write)
    device = model.device
    started = time.perf_counter()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inputs = torch.tensor([tokens], device=device)
        if sampling.cache and capture_reason(model) is None:
            steps = decode(model, inputs, choice=sampling.choice(), max_new_tokens=sampling.max_new_tokens)
            for (token,) in on_host(steps):
                stream.push(token)
                if stream.complete:
                    break
        else:
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                stopping_criteria=_reading(stream),
            )
    stream.end()
    seconds = time.perf_counter() - started
    return Sample(prompt, seed, stream.text, stream.complete, stream.tokens, round(seconds, 3))


def _reading(stream: "TextStream") -> Any:
    """A stopping criterion that feeds each new token to the stream; a streamer may get it a step later."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Reading(StoppingCriteria):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
            stream.push(int(input_ids[0, -1]))
            return torch.full((len(input_ids),), stream.complete, device=input_ids.device)  # type: ignore[return-value]

    return StoppingCriteriaList([Reading()])


class IncrementalDecoder:
    """Turns tokens into text as they come, holding back bytes that do not make a whole character yet.

    Each step decodes the last few tokens only, together with those before them, so that tokenizers whose pieces depend
    on their neighbours (leading spaces) give the text that decoding all tokens at once would.

    Args:
        decode: text of a list of tokens.
    """

    def __init__(self, decode: Callable[[list[int]], Any]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._given = 0  # tokens whose text was returned; those before them are context

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty."""
        self._tokens.append(token)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._tokens = self._tokens[self._given :]
        self._given = len(self._tokens)
        return text

    def flush(self) -> str:
        """What was held back; incomplete characters become U+FFFD."""
        text = self._pending()
        self._tokens, self._given = [], 0
        return text

    def _pending(self) -> str:
        before = self._decode(self._tokens[: self._given]) if self._given else ""
        return str(self._decode(self._tokens))[len(before) :]


class StopFilter:
    """Passes text on until one of some strings appears, and holds back what may be the start of one.

    Args:
        stops: strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """What can be passed on now."""
        if self.found:
            return ""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.found = True
            return self._take(min(places))
        return self._take(len(self._held) - self._overlap())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _overlap(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self.stops), default=1) - 1)
        fitting = (n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self.stops))
        return next(fitting, 0)


@dataclass
class TextStream:
    """Receives the generated tokens one by one and passes their text on.

    Attributes:
        text: all text so far.
        tokens: number of tokens so far.
        complete: whether the end of the document or a stop string came.
    """

    decoder: IncrementalDecoder
    stops: Iterable[str]
    end_of_document: int
    write: Callable[[str], None] | None = None
    text: str = ""
    tokens: int = 0
    complete: bool = False
    _filter: StopFilter = field(init=False)

    def __post_init__(self) -> None:
        self._filter = StopFilter(tuple(self.stops))

    def push(self, token: int) -> None:
        """Takes one token."""
        self.tokens += 1
        if token == self.end_of_document:
            self.complete = True
            return
        self._emit(self._filter.push(self.decoder.push(token)))
        self.complete = self._filter.found

    def end(self) -> None:
        """Passes on what was held back."""
        self._emit(self._filter.push(self.decoder.flush()))
        self._emit(self._filter.flush())
        self.complete |= self._filter.found

    def _emit(self, text: str) -> None:
        self.text += text
        if text and self.write is not None:
            self.write(text)
