"""Dilated attention: the formula, its fused form, its gradient modes, and the properties of its patterns."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.nn.positions import alibi_bias, xpos_rates
from farspan.ops import dilated_attention
from farspan.ops.dilated.boxes import reciprocal
from farspan.ops.dilated.limits import option_limits
from farspan.ops.dilated.patterns import DilatedSettings, head_offsets, pieces, score_entries
from farspan.ops.dilated.rotation import turn_factors, turn_pair
from farspan.ops.softmax.api import softmax_attention
from tests.ops.checks import assert_close, boundaries
from tests.tolerances import BFLOAT16, FLOAT64, GRADCHECK

RULES = st.sampled_from(["mod", "block", "none"])
PATTERNS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=3)


def _inputs(length: int, heads: int = 4, groups: int | None = None, channels: int = 6, batch: int = 2) -> list[Tensor]:
    shapes = [(batch, length, h, channels) for h in (heads, groups or heads, groups or heads)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _patterns(patterns: list[tuple[int, int]]) -> dict[str, list[int]]:
    return {"segment_lengths": [w for w, _ in patterns], "dilations": [r for _, r in patterns]}


def _gradients(out: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), tensors, retain_graph=True)


def _counts(length: int, heads: int, patterns: list[tuple[int, int]], rule: str, causal: bool) -> Tensor:
    """How many patterns show key s to query t of head h, `[H, T, T]`, token by token."""
    counts = torch.zeros(heads, length, length, dtype=torch.float64)
    for w, r in patterns:
        for h, offset in enumerate(head_offsets(rule, heads, r)):
            for t in range(length):
                for s in range(t + 1 if causal else length):
                    together = s // w == t // w and s % w % r == offset == t % w % r
                    counts[h, t, s] += together
    return counts


def _multiset(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax with the logarithm of the counts added to the scores; 0 for a row without keys."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    empty = ~counts.any(-1, keepdim=True)
    weights = (scores + counts.log()).masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return torch.einsum("bhts,bshv->bthv", weights, v)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(
    length=st.integers(1, 15),
    patterns=PATTERNS,
    rule=RULES,
    causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1), (6, 3)]),
)
def test_mixture_is_one_softmax_over_the_multiset(
    backend: str, length: int, patterns: list, rule: str, causal: bool, heads: tuple[int, int]
) -> None:
    tensors = _inputs(length, *heads)
    out = dilated_attention(*tensors, **_patterns(patterns), head_offset=rule, causal=causal, backend=backend)
    want = _multiset(*tensors, _counts(length, heads[0], patterns, rule, causal))
    assert_close(out, want, FLOAT64)
    for name, got, expected in zip("qkv", _gradients(out, tensors), _gradients(want, tensors), strict=True):
        assert_close(got, expected, FLOAT64, f"gradient of {name}", largest=torch.ones(()))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    patterns=PATTERNS,
    rule=RULES,
    causal=st.booleans(),
    detach=st.booleans(),
    pad_mode=st.sampled_from(["mask", "zero_keys"]),
)
def test_fused_equals_formula_for_packed_documents(
    lengths: list[int], patterns: list, rule: str, causal: bool, detach: bool, pad_mode: str
) -> None:
    tensors, bounds = _inputs(sum(lengths), batch=1), boundaries(lengths)
    options = {"head_offset": rule, "causal": causal, "detach_mixture_weights": detach, "pad_mode": pad_mode}
    outs = [
        dilated_attention(*tensors, **_patterns(patterns), **options, cu_seqlens=bounds, backend=backend)
        for backend in ("reference", "torch")
    ]
    assert_close(outs[1], outs[0], FLOAT64)
    for got, want in zip(_gradients(outs[1], tensors), _gradients(outs[0], tensors), strict=True):
        assert_close(got, want, FLOAT64, "gradient", largest=torch.ones(()))
    with torch.no_grad():  # without a gradient, constant mixture weights run fused
        alone = [
            dilated_attention(*(x[:, a:b] for x in tensors), **_patterns(patterns), **options)
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
    assert_close(outs[1], torch.cat(alone, dim=1), FLOAT64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("xpos", [True, False])
def test_bias_and_rotation_count_original_positions(causal: bool, groups: int, xpos: bool) -> None:
    tensors, length = _inputs(21, groups=groups), 21
    patterns = [(4, 2), (9, 3), (16, 1)]
    bias = torch.randn(4, 2 * 16 - 1, dtype=torch.float64, requires_grad=True)
    rates = xpos_rates(6, 16.0) if xpos else (None, None)
    distance = torch.arange(length) - torch.arange(length)[:, None]
    dense = bias[:, (15 + distance).clamp(0, 30)]
    if xpos:
        places = torch.arange(length, dtype=torch.float64)[:, None, None]
        turn = torch.exp(torch.complex(rates[1], rates[0]) * places)
        q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in tensors[:2])
        k = k.repeat_interleave(4 // groups, dim=2)
        product = torch.einsum("bthk,bshk->bhts", q * turn, (k / turn.conj()).conj()).real
        plain = torch.einsum("bthk,bshk->bhts", q, k.conj()).real
        dense = dense + (product - plain) * 6**-0.5
    want = _multiset(*tensors, _counts(length, 4, patterns, "mod", causal), dense)
    for backend in ("reference", "torch"):
        call = {**_patterns(patterns), "causal": causal, "frequencies": rates[0], "growth": rates[1]}
        out = dilated_attention(*tensors, **call, distance_bias=bias, backend=backend)
        fixed = dilated_attention(*tensors, **call, distance_bias=bias.detach(), backend=backend)
        assert_close(out, want, FLOAT64)
        assert_close(fixed, want, FLOAT64)
        for got, expected in zip(_gradients(out, [*tensors, bias]), _gradients(want, [*tensors, bias]), strict=True):
            assert_close(got, expected, FLOAT64, "gradient")
        for got, expected in zip(_gradients(fixed, tensors), _gradients(want, tensors), strict=True):
            assert_close(got, expected, FLOAT64, "gradient with a fixed bias")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_one_wide_dense_pattern_is_softmax_attention(causal: bool, backend: str) -> None:
    tensors = _inputs(13, groups=2)
    out = dilated_attention(*tensors, segment_lengths=[20], dilations=[1], causal=causal, backend=backend)
    want = softmax_attention(*tensors, causal=causal, backend="reference")
    assert_close(out, want, FLOAT64)
    for got, expected in zip(_gradients(out, tensors), _gradients(want, tensors), strict=True):
        assert_close(got, expected, FLOAT64, "gradient")


@given(pattern=st.tuples(st.integers(1, 8), st.integers(1, 3)), causal=st.booleans())
def test_duplicate_pattern_changes_nothing(pattern: tuple[int, int], causal: bool) -> None:
    tensors = _inputs(11)
    once = dilated_attention(*tensors, **_patterns([pattern]), causal=causal)
    twice = dilated_attention(*tensors, **_patterns([pattern, pattern]), causal=causal)
    assert_close(twice, once, FLOAT64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("detach", [True, False])
def test_gradcheck(backend: str, detach: bool) -> None:
    tensors = [torch.randn(1, 7, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        patterns = [(3, 1), (6, 2)] if not detach else [(3, 2)]  # one pattern has no mixture to detach
        return dilated_attention(q, k, v, **_patterns(patterns), detach_mixture_weights=detach, backend=backend)

    assert torch.autograd.gradcheck(call, tensors, atol=GRADCHECK)


def test_detached_mixture_has_the_gradient_of_constant_weights() -> None:
    tensors, patterns = _inputs(16), [(4, 1), (16, 2)]
    parts = [dilated_attention(*tensors, **_patterns([p])) for p in patterns]
    counts = [_counts(16, 4, [p], "mod", True) for p in patterns]
    scores = torch.einsum("bthk,bshk->bhts", *tensors[:2]) * 6**-0.5
    lses = torch.stack([(scores + c.log()).logsumexp(-1).transpose(1, 2) for c in counts])
    want = (lses.softmax(0).detach().unsqueeze(-1) * torch.stack(parts)).sum(0)
    true = dilated_attention(*tensors, **_patterns(patterns))
    for backend in ("reference", "torch"):
        out = dilated_attention(*tensors, **_patterns(patterns), detach_mixture_weights=True, backend=backend)
        assert_close(out, true, FLOAT64)
        for got, expected in zip(_gradients(out, tensors), _gradients(want, tensors), strict=True):
            assert_close(got, expected, FLOAT64, "gradient")
    differs = (_gradients(true, tensors)[0] - _gradients(want, tensors)[0]).abs().max()
    assert differs > 0.01


@given(t=st.integers(0, 19), patterns=PATTERNS, rule=RULES)
def test_future_does_not_change_past(t: int, patterns: list, rule: str) -> None:
    q, k, v = (x.detach() for x in _inputs(20))
    before = dilated_attention(q, k, v, **_patterns(patterns), head_offset=rule)
    for x in (q, k, v):
        x[:, t:] = torch.randn_like(x[:, t:])
    after = dilated_attention(q, k, v, **_patterns(patterns), head_offset=rule)
    assert torch.equal(after[:, :t], before[:, :t])


def test_segments_of_the_widest_pattern_do_not_see_each_other() -> None:
    q, k, v = (x.detach() for x in _inputs(20))
    call = {**_patterns([(4, 1), (8, 2)]), "causal": False}
    before = dilated_attention(q, k, v, **call)
    k[:, 8:16], v[:, 8:16] = 3.0, -3.0
    after = dilated_attention(q, k, v, **call)
    assert torch.equal(after[:, :8], before[:, :8]) and torch.equal(after[:, 16:], before[:, 16:])
    assert not torch.equal(after[:, 8:16], before[:, 8:16])


def test_shift_by_whole_segments_shifts_the_output() -> None:
    tensors = _inputs(12)
    frequencies, growth = xpos_rates(6, 16.0)
    call = {**_patterns([(4, 2), (8, 3)]), "frequencies": frequencies, "growth": growth}
    moved = [torch.cat((torch.randn_like(x[:, :8]), x), dim=1) for x in tensors]
    assert_close(dilated_attention(*moved, **call)[:, 8:], dilated_attention(*tensors, **call), FLOAT64)


def test_heads_of_one_offset_are_interchangeable() -> None:
    tensors = _inputs(14)
    call = {**_patterns([(4, 1), (12, 2)]), "head_offset": "mod"}
    order = [2, 1, 0, 3]  # heads 0 and 2 have offset 0
    swapped = dilated_attention(*(x[:, :, order] for x in tensors), **call)
    assert_close(swapped, dilated_attention(*tensors, **call)[:, :, order], FLOAT64)
    # With their offsets, any order: block offsets 0 0 1 1 are mod offsets 0 1 0 1 of the heads 0 2 1 3.
    by_block = dilated_attention(*(x[:, :, [0, 2, 1, 3]] for x in tensors), **{**call, "head_offset": "block"})
    assert_close(by_block, dilated_attention(*tensors, **call)[:, :, [0, 2, 1, 3]], FLOAT64)


@pytest.mark.parametrize(("heads", "dilation"), [(4, 4), (3, 5), (1, 2), (6, 7)])
def test_offset_rules_agree_when_dilation_reaches_the_heads(heads: int, dilation: int) -> None:
    assert head_offsets("mod", heads, dilation) == head_offsets("block", heads, dilation) == list(range(heads))


def test_offset_rules_of_paper_and_code() -> None:
    assert head_offsets("mod", 5, 2) == [0, 1, 0, 1, 0]
    assert head_offsets("block", 5, 2) == [0, 0, 0, 1, 1]


@given(length=st.integers(1, 20), patterns=PATTERNS, causal=st.booleans())
def test_weights_sum_to_one_with_a_dense_pattern(length: int, patterns: list, causal: bool) -> None:
    q, k, _ = _inputs(length)
    out = dilated_attention(q, k, torch.ones_like(k), **_patterns([(3, 1), *patterns]), causal=causal)
    assert_close(out, torch.ones_like(out), FLOAT64)


def test_rows_that_no_pattern_keeps_are_zero_and_have_no_gradient() -> None:
    tensors = _inputs(10)
    out = dilated_attention(*tensors, segment_lengths=[5], dilations=[3], head_offset="none")
    kept = torch.tensor([p % 5 % 3 == 0 for p in range(10)])
    assert (out[:, ~kept] == 0).all() and (out[:, kept] != 0).any()
    for gradient in _gradients(out, tensors):
        assert gradient.isfinite().all() and (gradient[:, ~kept] == 0).all()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_lengths(length: int, causal: bool) -> None:
    tensors, patterns = _inputs(length), [(8, 1), (8, 3)]
    out = dilated_attention(*tensors, **_patterns(patterns), causal=causal)
    assert_close(out, _multiset(*tensors, _counts(length, 4, patterns, "mod", causal)), FLOAT64)


def test_zero_keys_dilute_a_ragged_full_segment() -> None:
    tensors = _inputs(5, heads=1)
    out = dilated_attention(*tensors, segment_lengths=[4], dilations=[1], causal=False, pad_mode="zero_keys")
    q, _, v = tensors
    score = (q[:, 4] * tensors[1][:, 4]).sum(-1, keepdim=True) * 6**-0.5
    assert_close(out[:, 4], v[:, 4] * score.exp() / (score.exp() + 3), FLOAT64)
    causal = [
        dilated_attention(*tensors, segment_lengths=[4], dilations=[1], pad_mode=m) for m in ("mask", "zero_keys")
    ]
    assert torch.equal(*causal)


def test_released_filling_shifts_rows_where_the_dilation_does_not_divide() -> None:
    """Segments of 4 rows become 6 with r = 3: rows 6, 7, … hold the outputs of tokens 4, 5, …"""
    tensors = _inputs(8, heads=1)
    call = {"segment_lengths": [4], "dilations": [3], "head_offset": "none"}
    right, released = (dilated_attention(*tensors, **call, pad_mode=m) for m in ("mask", "zero_keys"))
    assert_close(released[:, 6], right[:, 4], FLOAT64)
    assert_close(released[:, :4], right[:, :4], FLOAT64)


@given(length=st.integers(1, 40), patterns=PATTERNS, rule=RULES, causal=st.booleans())
def test_pieces_cover_each_score_once(length: int, patterns: list, rule: str, causal: bool) -> None:
    settings = DilatedSettings(tuple(patterns), rule, causal=causal)
    assert score_entries(settings, 3, length) == int(_counts(length, 3, patterns, rule, causal).sum())


def test_score_count_of_whole_segments() -> None:
    """Σ n_i (w_i / r_i)² per head."""
    settings = DilatedSettings(((8, 1), (16, 2), (32, 4)), causal=False)
    assert score_entries(settings, 4, 64) == 4 * (8 * 8**2 + 4 * 8**2 + 2 * 8**2)


def test_pieces_are_views() -> None:
    x = torch.zeros(1, 24, 4, 2)
    for piece in pieces(DilatedSettings(((5, 2), (24, 3))), 4, [(0, 24)]):
        piece.view(x).add_(1)
    covered = torch.tensor([[(p % 5 % 2 == h % 2) + (p % 3 == h % 3) for h in range(4)] for p in range(24)])
    assert torch.equal(x[0, :, :, 0].long(), covered)


def test_long_segments_with_xpos_stay_finite() -> None:
    """A million tokens into the text: positions count from the middle of the segment."""
    tensors = [torch.randn(1, 2**20, 1, 2) for _ in range(3)]
    frequencies, growth = xpos_rates(2, 512.0, reach=2048)
    out = dilated_attention(
        *tensors, segment_lengths=[16, 2048], dilations=[2, 512], frequencies=frequencies, growth=growth
    )
    assert out.isfinite().all()
    tail = [x[:, -2048:].double() for x in tensors]
    alone = dilated_attention(
        *tail, segment_lengths=[16, 2048], dilations=[2, 512], frequencies=frequencies, growth=growth
    )
    assert_close(out[:, -2048:], alone, 1e-5)


def test_extreme_scores_stay_finite() -> None:
    tensors = [x.detach().float().mul(300).requires_grad_() for x in _inputs(20)]
    out = dilated_attention(*tensors, **_patterns([(4, 1), (16, 3)]))
    assert out.isfinite().all() and all(x.isfinite().all() for x in _gradients(out, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    tensors = _inputs(40, channels=8)
    patterns = _patterns([(8, 1), (32, 2)])
    narrow = [x.detach().to(dtype).requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    out, want = dilated_attention(*narrow, **patterns), dilated_attention(*wide, **patterns)
    assert out.dtype == dtype
    assert_close(out, want, BFLOAT16)
    for got, expected in zip(_gradients(out, narrow), _gradients(want, wide), strict=True):
        assert got.dtype == dtype
        assert_close(got, expected, 2 * BFLOAT16, "gradient")


def test_values_of_another_width() -> None:
    q, k, _ = _inputs(14)
    v = torch.randn(2, 14, 4, 3, dtype=torch.float64, requires_grad=True)
    outs = [dilated_attention(q, k, v, **_patterns([(4, 1), (8, 2)]), backend=b) for b in ("reference", "torch")]
    assert_close(outs[1], outs[0], FLOAT64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dropout_drops_weights_and_keeps_the_mean(backend: str) -> None:
    q, k, _ = (x.detach()[:1, :12] for x in _inputs(12))
    v = torch.eye(12, dtype=torch.float64)[None, :, None].expand(1, 12, 4, 12)
    call = {**_patterns([(6, 1), (12, 2)]), "causal": False, "backend": backend}
    weights = dilated_attention(q, k, v, **call)
    dropped = torch.stack([dilated_attention(q, k, v, **call, dropout=0.3) for _ in range(400)])
    assert (dropped.mean(0) - weights).abs().max() < 0.06
    share = (dropped == 0).double().mean() - (weights == 0).double().mean()
    assert 0.02 < share < 0.3


def test_alibi_is_a_bias_of_distance() -> None:
    tensors = _inputs(10)
    distance = (torch.arange(10) - torch.arange(10)[:, None]).abs().double()
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / 4) for h in range(4)], dtype=torch.float64)
    out = dilated_attention(*tensors, **_patterns([(5, 2), (10, 3)]), distance_bias=alibi_bias(4, 10).double())
    counts = _counts(10, 4, [(5, 2), (10, 3)], "mod", True)
    assert_close(out, _multiset(*tensors, counts, -slopes[:, None, None] * distance), FLOAT64)


def test_kept_for_backward_is_input_output_and_one_number_a_row() -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in _inputs(64))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = dilated_attention(q, k, v, **_patterns([(8, 1), (16, 2), (64, 4)]))
    assert sum(x.numel() for x in saved) == 4 * out.numel() + math.prod(out.shape[:3])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"segment_lengths": [4, 8]}, ConfigError, "equally long"),
        ({"segment_lengths": [0]}, ConfigError, "at least 1"),
        ({"dilations": []}, ConfigError, "at least one integer"),
        ({"head_offset": "modulo"}, ConfigError, "head_offset='modulo'"),
        ({"pad_mode": "zeros"}, ConfigError, "pad_mode='zeros'"),
        ({"dropout": 1.0}, ConfigError, "dropout=1.0"),
        ({"frequencies": torch.zeros(3)}, ConfigError, "belong together"),
        ({"frequencies": torch.zeros(2), "growth": torch.zeros(2)}, ShapeError, "frequencies has shape"),
        ({"distance_bias": torch.zeros(4, 5)}, ShapeError, "at least 7"),
        ({"distance_bias": torch.zeros(3, 9)}, ShapeError, "distance_bias has shape"),
        ({"k": torch.zeros(1, 9, 3, 6)}, ShapeError, "cannot share G=3|v has shape"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, ShapeError, "must start at 0 and end at N=9"),
        ({"backend": "cuda"}, ConfigError, "backend='cuda'"),
    ],
)
def test_bad_calls(change: dict, error: type[Exception], words: str) -> None:
    call = {name: torch.zeros(1, 9, 4, 6) for name in "qkv"} | {"segment_lengths": [4], "dilations": [2]}
    with pytest.raises(error, match=words):
        dilated_attention(**{**call, **change})


def test_kernels_turn_positions_where_segments_lie_in_the_longest() -> None:
    settings = DilatedSettings(((4, 1), (6, 2)), frequencies=torch.ones(2), growth=torch.ones(2))
    q = torch.zeros(1, 13, 1, 4)
    assert option_limits(q, settings, boundaries([6, 6, 1])) is None
    assert "divide the longest" in str(option_limits(q, settings, boundaries([6, 7])))


@pytest.mark.parametrize(("growth", "serves"), [(-2.0, True), (2.1, False)])
def test_kernels_turn_float16_where_it_can_hold_the_growth(growth: float, serves: bool) -> None:
    settings = DilatedSettings(((6, 1),), frequencies=torch.ones(2), growth=torch.tensor([0.0, growth]))
    dtypes = torch.bfloat16, torch.float16
    reasons = [option_limits(torch.zeros(1, 90, 1, 4, dtype=dtype), settings, None) for dtype in dtypes]
    assert reasons[0] is None and (reasons[1] is None) == serves


@given(divisor=st.integers(1, 2**31 - 1), quotient=st.integers(0, 2**31), off=st.integers(-1, 1))
def test_a_division_is_a_product(divisor: int, quotient: int, off: int) -> None:
    number = min(max(0, quotient % (2**31 // divisor + 1) * divisor + off), 2**31 - 1)
    _, factor, shift = reciprocal(divisor)
    assert -(2**31) <= factor < 0 <= shift < 32
    assert (2 * number * (factor % 2**32) >> 32) >> shift == number // divisor


def test_odd_channels_are_not_turned() -> None:
    q, factors = torch.zeros(1, 4, 2, 5), turn_factors(torch.arange(4).view(1, 4), 4, *xpos_rates(4, 64))
    with pytest.raises(ShapeError, match="K=5 is odd"):
        turn_pair(q, q, *factors)
