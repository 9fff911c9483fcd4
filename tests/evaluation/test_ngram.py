"""The n-gram baseline against its definition, counted with dictionaries."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from farspan.evaluation.ngram import END_OF_DOCUMENT, VOCABULARY, NgramModel

TRAIN = [b"def f(x):\n    return x\n", b"def g(y):\n    return f(y)\n", b"", b"x = 1\ny = 2\n"]


def discounts_by_formula(counts: Counter) -> list[float]:
    n1, n2, n3, n4 = (sum(count == times for count in counts.values()) for times in (1, 2, 3, 4))
    if 0 in (n1, n2, n3, n4):
        return [0, 0.5, 0.5, 0.5]
    y = n1 / (n1 + 2 * n2)
    raw = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return [0, *(min(max(value, 0.1), times - 0.1) for times, value in zip((1, 2, 3), raw, strict=True))]


def by_definition(documents: list[bytes], order: int):
    """Interpolated modified Kneser-Ney as a plain recursive function of (context, symbol)."""
    counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
    for document in documents:
        symbols = [END_OF_DOCUMENT] * (order - 1) + list(document) + [END_OF_DOCUMENT]
        counts[order].update(tuple(symbols[i - order + 1 : i + 1]) for i in range(order - 1, len(symbols)))
    for k in range(order - 1, 0, -1):
        counts[k].update(gram[1:] for gram in counts[k + 1])
    followers = [defaultdict(list) for _ in range(order + 1)]
    for k in range(1, order + 1):
        for gram, count in counts[k].items():
            followers[k][gram[:-1]].append(count)
    discounts = [discounts_by_formula(table) for table in counts]

    def probability(context: tuple[int, ...], symbol: int) -> float:
        k = len(context) + 1
        shorter = probability(context[1:], symbol) if context else 1 / VOCABULARY
        seen = followers[k][context]
        if not seen:
            return shorter
        discount = discounts[k]
        count = counts[k][(*context, symbol)]
        backoff = sum(discount[min(count, 3)] for count in seen)
        return (count - discount[min(count, 3)] + backoff * shorter) / sum(seen)

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_probabilities_equal_the_definition(order: int) -> None:
    model = NgramModel(order).fit(TRAIN)
    probability = by_definition(TRAIN, order)
    for text in (b"", b"d", b"def f(", b"return x", b"\xff\x00zz"):
        past = ([END_OF_DOCUMENT] * (order - 1) + list(text))[len(text) :]
        expected = [probability(tuple(past), symbol) for symbol in range(VOCABULARY)]
        np.testing.assert_allclose(model.distribution(text), expected, rtol=1e-12)


def test_two_byte_example_by_hand() -> None:
    # "ab" once, order 1: the symbols a, b and end, each counted once, discounted by 0.5 and mixed with 1/257
    model = NgramModel(1).fit([b"ab"])
    expected = (1 - 0.5 + 1.5 / 257) / 3
    assert model.distribution(b"")[ord("a")] == pytest.approx(expected, rel=1e-12)
    assert model.bits([b"a"]) == pytest.approx(-2 * np.log2(expected), rel=1e-12)


def test_probabilities_sum_to_one_with_estimated_discounts() -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(97, 105, size).astype(np.uint8).tobytes() for size in (4000, 1, 3000)]
    model = NgramModel(5).fit(documents)
    for context in (b"", b"a", b"abcde", b"zzzzz", documents[0][:40]):
        assert model.distribution(context).sum() == pytest.approx(1, abs=1e-12)
        assert model.distribution(context).min() > 0


def test_bits_add_up_position_by_position_and_document_by_document() -> None:
    model = NgramModel(4).fit(TRAIN)
    text = b"def h(x):\n"
    steps = [model.distribution(text[:i])[symbol] for i, symbol in enumerate([*text, END_OF_DOCUMENT])]
    assert model.bits([text]) == pytest.approx(-np.log2(steps).sum(), rel=1e-12)
    assert model.bits([text, b"x", b""]) == pytest.approx(sum(model.bits([d]) for d in (text, b"x", b"")), rel=1e-12)


def test_nothing_to_count_is_the_uniform_model() -> None:
    assert NgramModel(3).fit([]).bits([b"abc"]) == pytest.approx(4 * np.log2(257))


def test_training_text_gets_cheaper_with_the_order() -> None:
    costs = [NgramModel(order).fit(TRAIN).bits(TRAIN) for order in (1, 2, 4, 6)]
    assert costs == sorted(costs, reverse=True)


def test_order_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="order=8"):
        NgramModel(8)
