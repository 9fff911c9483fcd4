"""Bits per byte against the definition, as a plain loop that feeds one window at a time."""

import math

import numpy as np
import pytest
import torch

from farspan.errors import ConfigError, DataError
from farspan.evaluation.perplexity import bits_per_byte, spread
from tests.evaluation.tiny_evaluation import EOD, Text, texts

TOLERANCE = 1e-5  # relative; float32 sums in another order


def by_definition(model: torch.nn.Module, documents: list[Text], window: int) -> tuple[float, int, int]:
    """NLL, predictions and windows, one window and one position at a time, from the logits of the whole model."""
    nll, tokens, windows = 0.0, 0, 0
    for document in documents:
        sequence = [EOD, *document.tokens[:-1].tolist(), EOD]
        for start in range(0, len(sequence) - 1, window):
            inputs = sequence[start : min(start + window, len(sequence) - 1)]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([inputs])).logits[0].double()
            for position, row in enumerate(logits):
                nll -= float(row.log_softmax(-1)[sequence[start + position + 1]])
                tokens += 1
            windows += 1
    return nll, tokens, windows


@pytest.mark.parametrize(("window", "batch_tokens"), [(7, 20), (16, 8192), (1000, 30)])
def test_equals_the_definition(model: torch.nn.Module, window: int, batch_tokens: int) -> None:
    documents = texts(30, 1, 7, 0, 15, 16, 17)
    found = bits_per_byte(model, documents, window=window, end_of_document=EOD, batch_tokens=batch_tokens)
    nll, tokens, windows = by_definition(model, documents, window)
    assert (found.tokens, found.windows, found.all_windows) == (tokens, windows, windows)
    assert found.tokens == sum(len(document.tokens) for document in documents)  # one per token, the end included
    assert found.bytes == 3 * (30 + 1 + 7 + 15 + 16 + 17)  # the text alone
    assert found.nll == pytest.approx(nll, rel=TOLERANCE)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / found.bytes, rel=TOLERANCE)
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=TOLERANCE)


def test_the_end_token_may_be_left_out(model: torch.nn.Module) -> None:
    with_end = texts(9, 4)
    without = [Text(document.tokens[:-1], document.bytes) for document in with_end]
    first, second = (bits_per_byte(model, d, window=8, end_of_document=EOD) for d in (with_end, without))
    assert first == second


def test_a_sample_is_spread_evenly_and_the_same_every_time(model: torch.nn.Module) -> None:
    documents = texts(40, 3, 25, 60)
    sample = bits_per_byte(model, documents, window=8, end_of_document=EOD, max_windows=5)
    assert sample == bits_per_byte(model, documents, window=8, end_of_document=EOD, max_windows=5)
    assert (sample.windows, sample.all_windows) == (5, 19)
    windows = [(d, start) for d in documents for start in range(0, len(d.tokens), 8)]
    chosen = [windows[i] for i in spread(19, 5)]
    assert sample.tokens == sum(min(8, len(d.tokens) - start) for d, start in chosen)
    assert sample.bytes == pytest.approx(sum(d.bytes * min(8, len(d.tokens) - s) / len(d.tokens) for d, s in chosen))
    assert len({d.bytes for d, _ in chosen}) > 1  # not the first ones only


def test_spread() -> None:
    assert list(spread(3, None)) == list(spread(3, 3)) == list(spread(3, 9)) == [0, 1, 2]
    assert list(spread(10, 1)) == [5]
    assert list(spread(10, 5)) == [1, 3, 5, 7, 9]
    for total, wanted in ((100, 7), (1000, 999)):
        chosen = list(spread(total, wanted))
        assert len(set(chosen)) == wanted and min(chosen) >= 0 and max(chosen) < total
        assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


def test_mode_and_autocast(model: torch.nn.Module) -> None:
    model.train()
    exact = bits_per_byte(model, texts(50), window=16, end_of_document=EOD)
    assert model.training
    rough = bits_per_byte(model, texts(50), window=16, end_of_document=EOD, dtype=torch.bfloat16)
    assert rough.nll != exact.nll
    assert rough.nll == pytest.approx(exact.nll, rel=0.02)  # bfloat16 has 8 bits


def test_refusals(model: torch.nn.Module) -> None:
    with pytest.raises(DataError, match="no document"):
        bits_per_byte(model, [], window=8, end_of_document=EOD)
    for name in ("window", "max_windows"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            bits_per_byte(model, texts(3), end_of_document=EOD, **{"window": 8, name: 0})
