"""The protocols of perplexity by context length, against plain loops over logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farspan.evaluation import context_length
from farspan.evaluation.context_length import (
    by_position,
    carried_state,
    fixed_suffix,
    memory_is_bounded,
    position_edges,
    sliding_window,
    window_spans,
)
from farspan.evaluation.scoring import Scorer
from tests.evaluation.tiny_evaluation import VOCABULARY, tiny_model

TOLERANCE = 1e-4  # relative; float32, other order of sums
LENGTH = 50


@pytest.fixture
def texts() -> list[np.ndarray]:
    """Three texts of 50 inputs and their labels."""
    generator = np.random.default_rng(3)
    return [generator.integers(0, VOCABULARY, LENGTH + 1) for _ in range(3)]


def costs(model: torch.nn.Module, text: np.ndarray, start: int, end: int) -> np.ndarray:
    """NLL of the labels of positions start … end - 1 when nothing before `start` is known."""
    tokens = torch.from_numpy(text)
    with torch.no_grad():
        rows = model(input_ids=tokens[None, start:end]).logits[0].double().log_softmax(-1)
    return -rows[torch.arange(end - start), tokens[start + 1 : end + 1]].numpy()


@given(total=st.integers(1, 60), length=st.integers(1, 70), stride=st.integers(1, 70))
def test_every_token_is_scored_once_with_all_the_context_the_window_gives(total: int, length: int, stride: int) -> None:
    seen = np.zeros(total, int)
    step = min(stride, length)
    for number, (start, end, scored) in enumerate(window_spans(total, length, stride)):
        assert (start, end) == (number * step, min(number * step + length, total))
        assert scored == (start if number == 0 else min(start + length - step, total))
        seen[scored:end] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(("length", "stride"), [(8, 16), (16, 4), (20, 7), (50, 4), (64, 64)])
def test_sliding_window_equals_a_loop(
    model: torch.nn.Module, texts: list[np.ndarray], length: int, stride: int
) -> None:
    expected, tokens = 0.0, 0
    for text in texts:
        for position in range(LENGTH):  # each token from the one window that scores it, found by searching them all
            starts = range(0, LENGTH, min(stride, length))
            start = next(start for start in starts if position < start + length)
            expected += costs(model, text, start, min(start + length, LENGTH))[position - start]
            tokens += 1
    cell = sliding_window(Scorer(model, batch_tokens=40), texts, length, stride)
    assert (cell.tokens, cell.length, cell.status) == (tokens, length, "ok")
    assert cell.nll == pytest.approx(expected, rel=TOLERANCE)
    assert cell.perplexity == pytest.approx(math.exp(expected / tokens), rel=TOLERANCE)


def test_position_cells_are_means_over_their_positions(model: torch.nn.Module, texts: list[np.ndarray]) -> None:
    table = np.stack([costs(model, text, 0, LENGTH) for text in texts])
    cells = by_position(Scorer(model), texts)
    assert [(cell.start, cell.length) for cell in cells] == [(0, 16), (16, 32), (32, 50)]
    for cell in cells:
        part = table[:, cell.start : cell.length]
        assert cell.tokens == part.size
        assert cell.mean_nll == pytest.approx(part.mean(), rel=TOLERANCE)


def test_position_edges() -> None:
    assert position_edges(10) == [0, 10]
    assert position_edges(16) == [0, 16]
    assert position_edges(17) == [0, 16, 17]
    assert position_edges(128) == [0, 16, 32, 64, 128]


def test_suffix_scores_the_same_tokens_after_longer_prefixes(model: torch.nn.Module, texts: list[np.ndarray]) -> None:
    for length in (8, 20, 50):
        cell = fixed_suffix(Scorer(model), texts, length, suffix=6)
        expected = sum(costs(model, text, LENGTH - length, LENGTH)[-6:].sum() for text in texts)
        assert cell.tokens == 18
        assert cell.nll == pytest.approx(expected, rel=TOLERANCE)


def test_scaled_positions_plan_for_the_window_not_for_the_batch(texts: list[np.ndarray]) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model = tiny_model("softmax", rope_parameters=rope, max_position_embeddings=8)
    for batch_tokens in (20, 8192):
        cell = sliding_window(Scorer(model, batch_tokens), texts, 20, 20)
        expected = 0.0
        for text in texts:
            for start in (0, 20, 40):
                tokens = torch.from_numpy(text[start : start + 21])
                with torch.no_grad():
                    logits = model(input_ids=tokens[None, :-1], context_length=20).logits[0]
                expected += float(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum"))
        assert cell.nll == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("window", [7, 25, 64])
def test_carried_state_equals_one_pass(texts: list[np.ndarray], window: int) -> None:
    model = tiny_model("metala", "metala")
    cell = carried_state(Scorer(model, batch_tokens=2 * window), texts, window)
    expected = sum(costs(model, text, 0, LENGTH).sum() for text in texts)
    assert cell.tokens == 3 * LENGTH
    assert cell.nll == pytest.approx(expected, rel=TOLERANCE)


def test_only_constant_memories_can_be_carried() -> None:
    assert memory_is_bounded(tiny_model("metala").config)
    assert not memory_is_bounded(tiny_model("metala", "softmax").config)


def test_infinity_nan_and_memory_are_results(texts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("softmax")
    score = Scorer(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert sliding_window(score, texts, 16, 16).status == "inf"
    assert by_position(score, texts)[0].perplexity == math.inf
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert sliding_window(score, texts, 16, 16).status == "nan"
    assert {cell.status for cell in by_position(score, texts)} == {"nan"}

    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(model.model, "forward", exhausted)
    for cell in (sliding_window(score, texts, 16, 16), *by_position(score, texts), carried_state(score, texts, 16)):
        assert (cell.status, cell.tokens) == (context_length.OUT_OF_MEMORY, 0)


def test_other_errors_are_not_hidden(texts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("softmax")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        sliding_window(Scorer(model), texts, 16, 16)
