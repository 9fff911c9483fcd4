"""Which texts and lengths are chosen."""

from types import SimpleNamespace

import numpy as np
import pytest

from farspan.errors import ConfigError, DataError
from farspan.evaluation.context_length import window_spans
from farspan.evaluation.plan import Plan, make_plan

EOD = 0


def split(*sizes: int) -> SimpleNamespace:
    """A split of documents with so many tokens, their end included; token values count up."""
    tokens = np.arange(1, sum(sizes) + 1)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    tokens[starts[1:] - 1] = EOD
    return SimpleNamespace(name="valid", data=SimpleNamespace(tokens=tokens), starts=starts)


def plan(part: SimpleNamespace, **options) -> Plan:
    return make_plan(part, **{"trained": 16, "end_of_document": EOD, **options})


def test_long_documents_are_cut_from_their_beginnings() -> None:
    part = split(40, 10, 50, 40, 12, 41, 100)
    found = plan(part, lengths=[8, 40])
    assert (found.kind, len(found.texts), found.lengths) == ("documents", 5, (8, 40))
    for text, start in zip(found.texts, part.starts[[0, 2, 3, 5, 6]], strict=True):
        assert text.tolist() == [EOD, *part.data.tokens[start : start + 40]]


def test_short_documents_are_concatenated() -> None:
    part = split(40, 10, 50, 20)
    found = plan(part, lengths=[50])
    assert (found.kind, len(found.texts)) == ("concatenated documents", 2)
    stream = [EOD, *part.data.tokens]
    assert [text.tolist() for text in found.texts] == [stream[:51], stream[50:101]]


def test_default_lengths_end_where_the_data_do() -> None:
    assert plan(split(*[200] * 8), trained=64).lengths == (16, 32, 64, 128, 256)  # 4 · 512 > 1600 tokens
    assert plan(split(*[200] * 100), trained=64).lengths == (16, 32, 64, 128, 256, 512)
    assert plan(split(*[20] * 3), trained=64).lengths == (16,)
    assert plan(split(10), trained=64).lengths == (10,)
    assert plan(split(*[200] * 8), trained=2).lengths == (16,)


def test_budget_decides_how_many_texts_and_then_how_long() -> None:
    part = split(*[600] * 50)
    whole = plan(part, trained=64)
    half = plan(part, trained=64, max_tokens=whole.tokens // 2)
    assert whole.lengths == half.lengths
    assert (len(whole.texts), len(half.texts)) == (50, 25)
    assert half.tokens <= whole.tokens // 2
    assert not np.array_equal(half.texts[1], whole.texts[1])  # spread, not the first ones
    assert plan(part, trained=64, max_tokens=5000).lengths[-1] < 512
    assert len(plan(part, lengths=[256, 512], max_tokens=512).texts) == 1


def test_tokens_are_what_the_protocols_read() -> None:
    found = plan(split(*[64] * 5), lengths=[16, 64], stride=8, protocols=["sliding", "suffix"])
    sliding = sum(end - start for length in (16, 64) for start, end, _ in window_spans(64, length, 8))
    assert found.tokens == 5 * (sliding + 16 + 64)


def test_refusals() -> None:
    part = split(40, 40)
    with pytest.raises(DataError, match="length 81 is longer than the whole valid split, which has 80 tokens"):
        plan(part, lengths=[81])
    with pytest.raises(ConfigError, match="did you mean 'sliding'"):
        plan(part, protocols=["slidin"])
    with pytest.raises(ConfigError, match="none is named; Accepted: carried, position, sliding, suffix"):
        plan(part, protocols=[])
    with pytest.raises(ConfigError, match="max_tokens=15 is not enough for one text of 16 tokens"):
        plan(part, max_tokens=15)
    for name, value in (("stride", 0), ("max_tokens", 0), ("lengths", [0])):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            plan(part, **{name: value})
