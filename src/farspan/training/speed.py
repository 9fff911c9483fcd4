"""How fast a model trains, reads a prompt and decodes on this machine, and how much memory that takes."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.models import FarspanForCausalLM
from farspan.models.decoding import Choice, capture_reason, decode, on_host
from farspan.training.setup import compile_model, recompute_activations

# Decoded tokens that are not counted, and the fewest that leave one interval in every loop.
UNCOUNTED, FEWEST_TOKENS = 5, 7
# Tokens that go through the model at once when a long prompt is read.
PREFILL_CHUNK = 1 << 19


@dataclass(frozen=True)
class TrainingSpeed:
    """One shape of training steps: forward, backward and the optimiser, on random tokens.

    Attributes:
        batch, length: rows and tokens per row.
        compiled, checkpointed: whether under torch.compile, and with activation checkpointing.
        tokens_per_second: of the median step.
        step_ms: the median step.
        peak_gib: peak of allocated memory, model and optimiser included; None on a CPU.
        first_step_s: the first step, compilation included.
    """

    batch: int
    length: int
    compiled: bool
    checkpointed: bool
    tokens_per_second: float
    step_ms: float
    peak_gib: float | None
    first_step_s: float


@dataclass(frozen=True)
class DecodingSpeed:
    """One shape of decoding.

    Attributes:
        batch, context: rows, and tokens of each row that were read before.
        loop: `captured` (one CUDA graph a token), `eager` (the same loop, step by step) or `generate` (transformers').
        ms_per_token: median over the steps, reading the token on the host included.
        prefill_s: reading the context, in chunks.
        cache_bytes: the memory of all layers and rows after the prompt.
    """

    batch: int
    context: int
    loop: str
    ms_per_token: float
    prefill_s: float
    cache_bytes: int


def training_speed(
    model: Any,
    batch: int,
    length: int,
    *,
    compiled: bool = False,
    checkpointed: bool = False,
    steps: int = 8,
    warmup: int = 3,
) -> TrainingSpeed:
    """Trains `model` for some steps on random tokens; it is changed.

    Any causal language model of transformers will do. On a GPU it runs under bfloat16 autocast, everywhere with AdamW.

    Args:
        model: with float32 parameters, on its device.
        batch, length: the shape of a step.
        compiled: whether to run it under torch.compile (`compile_model`).
        checkpointed: whether to recompute each layer in the backward pass.
        steps: timed steps, at least 1.
        warmup: steps before them, at least 1.
    """
    device = next(model.parameters()).device
    model.train()
    if checkpointed:
        recompute_activations(model)
    if compiled:
        compile_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids, **_without_logits(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    first = _timed(step, device)
    for _ in range(warmup - 1):
        step()
    seconds = statistics.median(_timed(step, device) for _ in range(steps))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return TrainingSpeed(batch, length, compiled, checkpointed, batch * length / seconds, 1000 * seconds, peak, first)


@torch.no_grad()
def decoding_speed(
    model: FarspanForCausalLM, batch: int, context: int, *, tokens: int = 64, loops: tuple[str, ...] = ()
) -> list[DecodingSpeed]:
    """Decodes behind `context` random tokens, in each loop that the model can use.

    Args:
        model: in evaluation mode, on its device and of its dtype.
        batch: rows.
        context: tokens read before, at least 1.
        tokens: tokens to decode in each loop, at least `FEWEST_TOKENS`; the first `UNCOUNTED` are not counted.
        loops: which of `captured`, `eager`, `generate`; empty is all that are possible.

    Raises:
        ConfigError: where the captured loop was named and is not possible.
    """
    reason = capture_reason(model)
    if reason is not None and "captured" in loops:
        raise ConfigError(f"the captured loop cannot be measured: {reason}; leave it out.")
    possible = ("captured", "eager", "generate") if reason is None else ("eager", "generate")
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    results = []
    for loop in loops or possible:
        cache = model.new_cache(context + tokens)
        pieces = ids[:, :-1].split(max(1, PREFILL_CHUNK // batch), dim=1) if context > 1 else ()
        prefill = _timed(functools.partial(_read, model, pieces, cache), model.device)
        held = cache.nbytes()
        if loop == "generate":
            times = _generate_times(model, ids, cache, tokens)
        else:
            steps = decode(
                model,
                ids[:, -1:],
                past_key_values=cache,
                choice=Choice(1.0, top_p=0.95),
                max_new_tokens=tokens,
                capture=loop == "captured",
            )
            times = list(_intervals(on_host(steps)))
        results.append(DecodingSpeed(batch, context, loop, 1000 * statistics.median(times[UNCOUNTED:]), prefill, held))
    return results


def _read(model: FarspanForCausalLM, pieces: Any, cache: Any) -> None:
    for piece in pieces:
        model(piece, past_key_values=cache, logits_to_keep=1)


def _generate_times(model: FarspanForCausalLM, ids: Tensor, cache: Any, tokens: int) -> list[float]:
    """Seconds between the tokens of `model.generate`, given the whole text and a cache of all but its last token."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    stamps = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            input_ids[0, -1].item()
            stamps.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    if not cache.tokens_seen:
        cache = None
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=True,
        top_p=0.95,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Clock()]),
    )
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def _intervals(steps: Iterator[Any]) -> Iterator[float]:
    earlier = time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        yield now - earlier
        earlier = now


def _without_logits(model: Any) -> dict[str, Any]:
    """Ours forms the loss without the logits of all tokens; others have no such argument."""
    return {"output_logits": False} if isinstance(model, FarspanForCausalLM) else {}


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
