"""Decoding at the speed of the card: one token after another, the whole step captured in a CUDA graph.

A step of a small model is a few hundred short kernels, and launching them takes longer than running them. Where every
layer's memory can stay in one place, because its size is constant or because it is given room for many tokens at once,
the step is captured and replayed: model, choice of the token and the counting of positions included. Elsewhere, and on
the CPU, the same loop runs step by step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.models.cache import FarspanCache
from farspan.models.causal_lm import FarspanForCausalLM
from farspan.nn.joint import joined

# Steps for which a memory that grows is given room at once.
ROOM = 8192


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from logits, without asking the device for a value.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together have this probability; 1 is all.

    Raises:
        ConfigError: for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, accepted, text in (
            ("temperature", 0 <= self.temperature < float("inf"), "numbers from 0 (greedy) upwards"),
            ("top_k", self.top_k >= 0, "whole numbers from 1, or 0 for no limit"),
            ("top_p", 0 < self.top_p <= 1, "numbers above 0, up to 1"),
        ):
            if not accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not accepted; accepted are {text}.")

    def __call__(self, logits: Tensor) -> Tensor:
        """`[B, V]` logits → `[B]` token ids, drawn with the device's default generator."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = self.probabilities(logits)
        # argmax of p_i / E_i with E_i exponential draws from p: the exponential race, which needs no host.
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """`[B, V]` float32: what a token is drawn from."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, places = probabilities.sort(dim=-1, descending=True)
            above = ordered.cumsum(-1) - ordered  # what the likelier tokens have together
            kept = ordered.masked_fill(above >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, places, kept)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


def growing_memories(model: FarspanForCausalLM) -> list[str]:
    """The mixers of this model whose memory does not stay in one place while decoding: a step cannot be captured."""
    layers = zip(model.config.mixers, model.new_cache().layers, strict=True)
    return sorted({name for name, layer in layers if not layer.can_pin})


def capture_reason(model: FarspanForCausalLM) -> str | None:
    """Why a decoding step of this model cannot be captured in a CUDA graph, or None if it can."""
    if growing := growing_memories(model):
        return f"the memory of {', '.join(growing)} does not stay in one place"
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}; CUDA graphs need an NVIDIA GPU"
    return None


def decode(
    model: FarspanForCausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    past_key_values: FarspanCache | None = None,
    choice: Choice | None = None,
    max_new_tokens: int = 256,
    capture: bool | None = None,
) -> Iterator[Tensor]:
    """Continues prompts token by token; stop when you have enough.

    Args:
        model: a language model in evaluation mode.
        input_ids: `[B, T]` int64, T ≥ 1.
        attention_mask: `[B, T]`, 1 for real tokens; the last token of every row must be real.
        past_key_values: the memory of what stands before `input_ids`; it is used up: models refuse it afterwards. None
            starts a new text.
        choice: how tokens are chosen; None takes the likeliest.
        max_new_tokens: number of tokens to yield, at least 1.
        capture: whether to replay a captured CUDA graph; None where it is possible (`capture_reason`).

    Yields:
        `[B]` int64, the next token of every row. On a GPU the tensor is new each time and may be read later: the step
        after it is then already running.

    Raises:
        ConfigError: for fewer tokens than 1, for a used cache, and where a step that is asked for cannot be captured.
        ShapeError: for inputs that do not fit each other; and, when it comes to that token, beyond learned positions.

    Example:
        >>> import torch
        >>> from farspan import FarspanConfig, FarspanForCausalLM
        >>> config = FarspanConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, mixers=["metala"])
        >>> model = FarspanForCausalLM(config).eval()
        >>> len(list(decode(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5)))
        5
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not accepted; accepted are whole numbers from 1.")
    if not input_ids.numel():
        raise ShapeError(f"input_ids has shape {list(input_ids.shape)}; a text to continue has at least one token.")
    if attention_mask is not None and not bool((attention_mask[:, -1] == 1).all()):
        raise ShapeError("attention_mask ends with padding; the last token of every row must be real: pad on the left.")
    choice = choice or Choice()
    reason = capture_reason(model)
    if capture and reason is not None:
        raise ConfigError(f"capture=True: {reason}; leave capture out, or give capture=False.")
    capture = reason is None if capture is None else capture
    given = model.new_cache(input_ids.shape[1] + max_new_tokens) if past_key_values is None else past_key_values
    with torch.no_grad():
        logits = model(input_ids, attention_mask=attention_mask, past_key_values=given, logits_to_keep=1).logits
        token = choice(logits[:, -1])
    cache = given.taken()
    yield token
    if max_new_tokens > 1:
        steps = _Step(model, cache, token, choice)
        if all(layer.can_pin for layer in cache.layers):
            with joined(model):
                yield from steps.pinned(max_new_tokens - 1, capture)
        else:
            yield from (steps.run() for _ in range(max_new_tokens - 1))


def on_host(steps: Iterator[Tensor]) -> Iterator[list[int]]:
    """The tokens of `decode` as numbers, each read while the next step is already running.

    Args:
        steps: `[B]` int64 each.

    Yields:
        B numbers. On a GPU one step more than is consumed may have been run.
    """
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for token in steps:
        if not token.is_cuda:
            yield token.tolist()
            continue
        copy = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
        copy.copy_(token, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(token.device))
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0].tolist()
        waiting = copy, done
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0].tolist()


class _Step:
    """One decoding step on tensors that stay where they are."""

    def __init__(self, model: FarspanForCausalLM, cache: FarspanCache, token: Tensor, choice: Choice) -> None:
        self.model, self.cache, self.choice = model, cache, choice
        assert cache.next_positions is not None
        self.token = token.clone()
        self.positions = cache.next_positions.to(token.device).clone().unsqueeze(-1)

    def _advance(self) -> None:
        inputs = self.token.unsqueeze(-1)
        logits = self.model(inputs, position_ids=self.positions, past_key_values=self.cache).logits
        self.token.copy_(self.choice(logits[:, -1]))
        self.positions.add_(1)

    def run(self) -> Tensor:
        """The next token of every row."""
        with torch.no_grad():
            self._advance()
        return self.token.clone()

    def pinned(self, count: int, capture: bool) -> Iterator[Tensor]:
        """`count` next tokens; memories that grow get room for so many steps at a time, and a graph of their own."""
        for start in range(0, count, ROOM):
            steps = min(ROOM, count - start)
            for layer in self.cache.layers:
                layer.pin(steps)
            yield from self._captured(steps) if capture else (self.run() for _ in range(steps))

    def _captured(self, count: int) -> Iterator[Tensor]:
        """The first step runs as it is, which compiles and allocates what the graph will use."""
        stream = torch.cuda.Stream(self.token.device)
        stream.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(stream):
            first = self.run()
        torch.cuda.current_stream(self.token.device).wait_stream(stream)
        yield first
        if count == 1:
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), torch.no_grad():  # a stream of the model's device
            self._advance()
        room = self._room(count - 1)
        for _ in range(room):
            graph.replay()
            yield self.token.clone()
        if room < count - 1:
            yield self.run()  # which says that the positions have come to an end

    def _room(self, steps: int) -> int:
        """How many of the next steps stand at positions that the model has."""
        config = self.model.config
        if config.position_embedding != "learned":
            return steps
        return min(steps, max(0, config.max_position_embeddings - int(self.positions.max())))
