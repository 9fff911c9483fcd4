"""Negative log-likelihoods of stretches of text: the one place where evaluation runs a model."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from farspan.nn.losses import token_nll

if TYPE_CHECKING:
    from farspan.models import FarspanForCausalLM


class Document(Protocol):
    """A text as `PreparedDataset.documents` gives it."""

    @property
    def tokens(self) -> np.ndarray:
        """Integers `[T]`, with or without the end-of-document token at the end."""

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""


@dataclass(frozen=True)
class Stretch:
    """Tokens that are read together, and what they have to predict; nothing before them is known.

    Args:
        inputs: int64 `[T]`.
        labels: int64 `[T]`, `labels[t]` is what position `t` has to predict.
        skip: number of leading positions that are context only and are not scored.
    """

    inputs: np.ndarray
    labels: np.ndarray
    skip: int = 0


def with_boundaries(tokens: np.ndarray, end_of_document: int) -> np.ndarray:
    """`[EOD, t_0, …, t_{n-1}, EOD]`: the token that ends a document also starts one, so it has n + 1 predictions."""
    inner = tokens[:-1] if len(tokens) and tokens[-1] == end_of_document else tokens
    return np.concatenate(([end_of_document], inner, [end_of_document])).astype(np.int64)


def ignore_progress(tokens: int) -> None:
    """The default of `Scorer.advance`."""


@dataclass
class Scorer:
    """Scores stretches of text with a model, packed into forward passes of about `batch_tokens` tokens.

    Args:
        model: the model; it is put into evaluation mode for the time of a pass, then back.
        batch_tokens: tokens per forward pass; a longer stretch is a pass of its own.
        dtype: autocast dtype of the stack, None for the dtype of the weights. Head and softmax are float32 in any case.
        advance: called with the number of tokens after each pass.
    """

    model: "FarspanForCausalLM"
    batch_tokens: int = 8192
    dtype: torch.dtype | None = None
    advance: Callable[[int], None] = ignore_progress

    def __call__(self, stretches: Iterable[Stretch], context_length: int) -> Iterator[np.ndarray]:
        """Yields the NLL of each stretch's scored positions in nats, float32 `[T - skip]`, in order.

        Args:
            stretches: what to score.
            context_length: the length that scaled positions plan for: that of a whole window, whatever a batch holds.
        """
        for batch in _batches(stretches, self.batch_tokens):
            yield from self._score(batch, context_length)
            self.advance(sum(len(stretch.inputs) for stretch in batch))

    def _score(self, batch: list[Stretch], context_length: int) -> list[np.ndarray]:
        device = self.model.device
        lengths = np.array([len(stretch.inputs) for stretch in batch])
        starts = np.concatenate(([0], np.cumsum(lengths)))
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        scored = positions >= np.repeat([stretch.skip for stretch in batch], lengths)
        labels = np.concatenate([stretch.labels[stretch.skip :] for stretch in batch])
        with evaluating(self.model), self.autocast():
            hidden = self.model.model(
                input_ids=torch.from_numpy(np.concatenate([stretch.inputs for stretch in batch])[None]).to(device),
                position_ids=torch.from_numpy(positions[None]).to(device),
                cu_seqlens=torch.from_numpy(starts.astype(np.int32)).to(device),
                context_length=context_length,
                use_cache=False,
            ).last_hidden_state[0]
        nll = self.head(hidden[torch.from_numpy(scored).to(device)], torch.from_numpy(labels).to(device))
        return np.split(nll, np.cumsum([len(stretch.labels) - stretch.skip for stretch in batch])[:-1])

    def head(self, hidden: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        """NLL of `labels` `[...]` after hidden states `[..., D]`, float32."""
        head = self.model.lm_head
        bias = None if head.bias is None else head.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return token_nll(hidden.float(), head.weight.float(), labels, bias).cpu().numpy()

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context in which the stack runs."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, self.dtype)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and the mode of before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def perplexity(nll: float, tokens: int) -> float:
    """`exp(nll / tokens)`; inf where that overflows, nan when there is nothing to average."""
    if not tokens:
        return math.nan
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def _batches(stretches: Iterable[Stretch], limit: int) -> Iterator[list[Stretch]]:
    batch: list[Stretch] = []
    size = 0
    for stretch in stretches:
        if batch and size + len(stretch.inputs) > limit:
            yield batch
            batch, size = [], 0
        batch.append(stretch)
        size += len(stretch.inputs)
    if batch:
        yield batch
