"""Collinear attention: both forms are their formulas, and have the symmetries that the formulas promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.nn.positions import rope_frequencies, rotary_table
from farspan.ops import collinear_attention, collinear_coefficients
from farspan.ops.collinear.reference import collinear_key, collinear_query
from tests import tolerances
from tests.ops.checks import assert_close, boundaries

FORMS = ("slack", "strict")


def table(positions: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin in float64, `[B, S, r/2]`."""
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = positions.double().unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def scores(
    q: Tensor, t: Tensor, places: Tensor, form: str, *, tie: str = "rotary", rotary_dim: int | None = None
) -> Tensor:
    """`[B, H, T, S]` without scale, of as many heads as t has."""
    cos, sin = table(places, rotary_dim or q.shape[-1])
    query = collinear_query(q, cos, sin, form=form, scale=1.0)
    return torch.einsum("bthk,bshk->bhts", query, collinear_key(t, cos, sin, form=form, tie=tie))


def make(length: int = 7, width: int = 8, heads: int = 2, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q, t and positions that start at another place in every row."""
    q = torch.randn(batch, length, heads, width, dtype=torch.float64)
    t = torch.rand(batch, length, heads, width // 2, dtype=torch.float64)
    return q, t, torch.arange(length) + torch.arange(5, 5 + 40 * batch, 40)[:, None]


def rotated(x: Tensor, place: int, rotary_dim: int) -> Tensor:
    """R_place x of one head, pair by pair."""
    y, half = x.clone(), rotary_dim // 2
    for j in range(half):
        angle = place * 10000.0 ** (-2 * j / rotary_dim)
        y[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
        y[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
    return y


@pytest.mark.parametrize(("rotary_dim", "tie"), [(8, "rotary"), (8, "head"), (4, "rotary"), (4, "head"), (2, "rotary")])
@pytest.mark.parametrize("form", FORMS)
def test_scores_are_the_definitions(form: str, rotary_dim: int, tie: str) -> None:
    q, _, places = make(length=4)
    raw = torch.randn_like(q)
    t = collinear_coefficients(raw, rotary_dim, tie=tie)
    # Every channel's coefficient by hand: relu of the mean of the channel and its partner.
    width = q.shape[-1]
    partner = {j: (j + width // 2) % width for j in range(width)}
    if tie == "rotary":
        rest = width - rotary_dim
        partner = {j: (j + rotary_dim // 2) % rotary_dim for j in range(rotary_dim)}
        partner |= {rotary_dim + j: rotary_dim + (j + rest // 2) % rest for j in range(rest)}
    tied = torch.stack([((raw[..., j] + raw[..., partner[j]]) / 2).clamp(min=0) for j in range(width)], dim=-1)
    if form == "strict" and tie == "head" and rotary_dim < width:
        return  # refused, see test_bad_calls
    got = scores(q, t, places, form, tie=tie, rotary_dim=rotary_dim)
    for b, h, m, n in [(b, h, m, n) for b in range(2) for h in range(2) for m in range(4) for n in range(4)]:
        place_m, place_n = int(places[b, m]), int(places[b, n])
        query, coefficients = q[b, m, h], tied[b, n, h]
        turned = rotated(query, place_m, rotary_dim)
        if form == "slack":
            want = (turned * query * rotated(coefficients, place_n, rotary_dim)).sum()
        else:
            want = (turned * rotated(query, place_n, rotary_dim) * coefficients).sum()
        assert got[b, h, m, n].item() == pytest.approx(want.item(), abs=1e-12)


def test_strict_is_a_sum_of_cosines() -> None:
    q, t, places = make()
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    distance = (places[:, :, None] - places[:, None, :]).double()
    norms = q[..., :4].square() + q[..., 4:].square()
    want = torch.einsum("bshj,bthj,btsj->bhts", t, norms, (distance.unsqueeze(-1) * frequencies).cos())
    assert_close(scores(q, t, places, "strict"), want, tolerances.FLOAT64)


def test_slack_is_its_closed_form() -> None:
    """With ψ the angle of the query pair from the diagonal: a score of m − n and one of m + n."""
    q, t, places = make()
    a, b = q[..., :4], q[..., 4:]
    psi = (torch.atan2(b, a) - math.pi / 4)[:, :, None]
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    minus = (places[:, :, None] - places[:, None, :])[..., None, None] * frequencies
    plus = (places[:, :, None] + places[:, None, :])[..., None, None] * frequencies
    angle = psi.cos() * (minus + psi).cos() + psi.sin() * (plus + psi).sin()
    want = torch.einsum("bshj,bthj,btshj->bhts", t, a.square() + b.square(), angle)
    assert_close(scores(q, t, places, "slack"), want, tolerances.FLOAT64)


def test_head_tie_with_partial_rotation_is_its_closed_form() -> None:
    q, t, places = make(width=16)
    cos, sin = table(places, 4)
    channel = torch.cat((t, t), dim=-1)
    assert not torch.equal(channel[..., :2], channel[..., 2:4])  # no rotary pair is tied
    a, b, t1, t2 = q[..., :2], q[..., 2:4], channel[..., :2], channel[..., 2:4]

    def part(coefficient: Tensor, query: Tensor, at_m: Tensor, at_n: Tensor) -> Tensor:
        return torch.einsum("bshj,bthj,btj,bsj->bhts", coefficient, query, at_m, at_n)

    want = part(t1, a * a, cos, cos) - part(t1, a * b, sin, cos) + part(t1, b * b, cos, sin) + part(t1, a * b, sin, sin)
    want += (
        part(t2, b * b, cos, cos) + part(t2, a * b, sin, cos) - part(t2, a * a, cos, sin) + part(t2, a * b, sin, sin)
    )
    want += torch.einsum("bshc,bthc->bhts", channel[..., 4:], q[..., 4:].square())
    assert_close(scores(q, t, places, "slack", tie="head", rotary_dim=4), want, tolerances.FLOAT64)


def test_forms_agree_on_tied_queries_and_at_position_zero() -> None:
    q, t, places = make()
    strict = scores(q, t, places, "strict")
    radius = ((q[..., :4].square() + q[..., 4:].square()) / 2).sqrt()
    tied = torch.cat((radius, radius), dim=-1)
    assert_close(scores(tied, t, places, "slack"), scores(tied, t, places, "strict"), tolerances.FLOAT64)
    assert_close(scores(tied, t, places, "slack"), strict, tolerances.FLOAT64)
    from_zero = torch.arange(7).expand(2, -1)
    slack, strict = (scores(q, t, from_zero, form)[..., 0] for form in FORMS)
    assert_close(slack, strict, tolerances.FLOAT64)


def test_strict_looks_at_itself_without_seeing_where_it_is() -> None:
    q, t, places = make(length=200)
    slack, strict = (scores(q, t, places, form).diagonal(dim1=-2, dim2=-1) for form in FORMS)
    norms = q[..., :4].square() + q[..., 4:].square()
    assert_close(strict, (t * norms).sum(-1).transpose(1, 2), tolerances.FLOAT64)
    assert (strict >= 0).all() and (slack < 0).any()


@given(shift=st.integers(1, 10_000))
def test_only_strict_is_invariant_to_a_shift(shift: int) -> None:
    q, t, places = make()
    assert_close(scores(q, t, places + shift, "strict"), scores(q, t, places, "strict"), 1e-9)
    moved = (scores(q, t, places + shift, "slack") - scores(q, t, places, "slack")).abs().max()
    assert moved > 1e-3


def test_only_strict_is_invariant_to_turning_a_query_pair() -> None:
    q, t, places = make()
    angle = torch.rand(2, 7, 2, 4, dtype=torch.float64) * 6
    a, b = q[..., :4], q[..., 4:]
    turned = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)
    flipped = q * (torch.rand_like(q) < 0.5).double().mul(2).sub(1)
    for changed in (turned, flipped):
        assert_close(scores(changed, t, places, "strict"), scores(q, t, places, "strict"), tolerances.FLOAT64)
        assert (scores(changed, t, places, "slack") - scores(q, t, places, "slack")).abs().max() > 0.1
    assert_close(scores(-q, t, places, "slack"), scores(q, t, places, "slack"), tolerances.FLOAT64)


@pytest.mark.parametrize("form", FORMS)
@given(factor=st.floats(-8, 8), positive=st.floats(1e-3, 8))
def test_scores_are_quadratic_in_queries_and_linear_in_positive_raw_keys(
    form: str, factor: float, positive: float
) -> None:
    q, _, places = make()
    raw = torch.randn_like(q)
    plain = scores(q, collinear_coefficients(raw), places, form)
    scaled = scores(factor * q, collinear_coefficients(positive * raw), places, form)
    assert_close(scaled, factor**2 * positive * plain, tolerances.FLOAT64)


def test_strict_scores_peak_at_the_query_and_are_bounded() -> None:
    q, t, places = make(length=60)
    everywhere = t[:, :1].expand_as(t)
    same = scores(q, everywhere, places, "strict")
    assert (same <= same.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) + 1e-12).all()
    norms = q[..., :4].square() + q[..., 4:].square()
    assert (scores(q, t, places, "strict").abs() <= torch.einsum("bshj,bthj->bhts", t, norms) + 1e-12).all()
    # One pair alone falls with the distance while |m − n| θ_j ≤ π; pair 1 turns by 0.1 a step.
    alone = torch.zeros_like(everywhere)
    alone[..., 1] = 1.0
    falling = scores(q, alone, places, "strict")[..., 0, :31]
    assert (falling.diff(dim=-1) < 0).all()


def test_symmetric_in_direction_when_strict() -> None:
    q, t, places = make()
    q, t = q[:, :1].expand_as(q), t[:, :1].expand_as(t)
    strict = scores(q, t, places, "strict")
    assert_close(strict, strict.transpose(-1, -2), tolerances.FLOAT64)


@pytest.mark.parametrize(
    ("rotary_dim", "tie", "pairs"), [(6, "rotary", (0, 3)), (4, "rotary", (0, 2)), (4, "head", (0, 3))]
)
def test_gradient_of_tied_channels_is_equal_and_zero_below_the_relu(
    rotary_dim: int, tie: str, pairs: tuple[int, int]
) -> None:
    raw = torch.randn(2, 9, 2, 6, dtype=torch.float64, requires_grad=True)
    t = collinear_coefficients(raw, rotary_dim, tie=tie)
    (t * torch.randn_like(t)).sum().backward()
    first, second = raw.grad[..., pairs[0]], raw.grad[..., pairs[1]]
    dead = (raw[..., pairs[0]] + raw[..., pairs[1]]) <= 0
    assert torch.equal(first, second)
    assert (first[dead] == 0).all() and (first[~dead] != 0).all() and dead.any()


def test_interleaved_pairs_are_a_permutation_of_the_channels() -> None:
    """Pairs (2j, 2j+1) with permuted channels give the scores of pairs (j, j + K/2)."""
    q, t, places = make()
    order = torch.arange(8).reshape(2, 4).T.flatten()  # 0 4 1 5 2 6 3 7
    cos, sin = (x.repeat_interleave(2, dim=-1).unsqueeze(2) for x in table(places, 8))
    mixed = t.repeat_interleave(2, dim=-1)

    def turn(x: Tensor) -> Tensor:
        partner = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
        return x * cos + partner * sin

    permuted = q[..., order]
    want = torch.einsum("bthk,bthk,bshk->bhts", permuted, turn(permuted), turn(mixed))
    assert_close(scores(q, t, places, "slack"), want, tolerances.FLOAT64)


def _inputs(queries: int, keys: int, heads: int = 4, groups: int = 2) -> list[Tensor]:
    shapes = ((2, queries, heads, 8), (2, keys, groups, 4), (2, keys, groups, 5))
    q, t, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_() for x in (q, t.abs(), v)]


@given(
    queries=st.integers(1, 9),
    past=st.integers(0, 5),
    window=st.one_of(st.none(), st.integers(1, 12)),
    rotary_dim=st.sampled_from([2, 4, 8]),
    variant=st.sampled_from([("slack", "rotary"), ("slack", "head"), ("strict", "rotary")]),
    causal=st.booleans(),
    masked=st.booleans(),
)
def test_fused_equals_reference(
    queries: int,
    past: int,
    window: int | None,
    rotary_dim: int,
    variant: tuple[str, str],
    causal: bool,
    masked: bool,
) -> None:
    tensors = _inputs(queries, queries + past)
    places = torch.arange(queries + past) + torch.tensor([[3], [50]])
    options = {
        "form": variant[0],
        "tie": variant[1],
        "window": window,
        "causal": causal,
        "key_mask": torch.rand(2, queries + past) > 0.3 if masked else None,
    }
    weight = torch.randn(2, queries, 4, 5, dtype=torch.float64)
    results = {}
    for backend in ("reference", "torch"):
        out = collinear_attention(*tensors, *table(places, rotary_dim), backend=backend, **options)
        results[backend] = [out, *torch.autograd.grad((out * weight).sum(), tensors)]
    for fused, plain in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_reference_is_a_loop_over_the_formula(form: str) -> None:
    q, t, places = make(length=5)
    v = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    out = collinear_attention(q, t, v, *table(places, 8), form=form, window=3, backend="reference")
    raw_scores = scores(q, t, places, form)
    for b, m, h in [(b, m, h) for b in range(2) for m in range(5) for h in range(2)]:
        keys = range(max(0, m - 2), m + 1)
        weights = [math.exp(raw_scores[b, h, m, n] / math.sqrt(8)) for n in keys]
        want = sum(w * v[b, n, h] for w, n in zip(weights, keys, strict=True)) / sum(weights)
        assert_close(out[b, m, h], want, tolerances.FLOAT64)


@pytest.mark.parametrize(
    ("form", "tie", "rotary_dim"), [("slack", "rotary", 4), ("strict", "rotary", 2), ("slack", "head", 2)]
)
def test_gradients_equal_finite_differences(form: str, tie: str, rotary_dim: int) -> None:
    cos, sin = table(torch.arange(4)[None] + 2, rotary_dim)
    shapes = ((1, 3, 2, 4), (1, 4, 1, 4), (1, 4, 1, 3))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def call(q: Tensor, raw: Tensor, v: Tensor) -> Tensor:
        t = collinear_coefficients(raw, rotary_dim, tie=tie)
        return collinear_attention(q, t, v, cos, sin, form=form, tie=tie, backend="reference")

    assert torch.autograd.gradcheck(call, leaves, atol=tolerances.GRADCHECK)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_closed_forms(form: str) -> None:
    """With g and w the gradients of query and key: dq = g ∘ R q + Rᵀ(g ∘ q) for slack, and so on."""
    q, t, places = make()
    q.requires_grad_(), t.requires_grad_()
    cos, sin = (x.unsqueeze(2) for x in table(places, 8))
    query = collinear_query(q, *table(places, 8), form=form, scale=1.0)
    key = collinear_key(t, *table(places, 8), form=form, tie="rotary")
    g, w = torch.randn_like(query), torch.randn_like(key)
    dq, dt = torch.autograd.grad((query * g).sum() + (key * w).sum(), (q, t))
    (a, b), (g1, g2), (w1, w2) = (x.detach().chunk(2, dim=-1) for x in (q, g, w))
    if form == "slack":
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        back = torch.cat((g1 * a * cos + g2 * b * sin, g2 * b * cos - g1 * a * sin), dim=-1)
        want_q, want_t = g * turned + back, w1 * (cos - sin) + w2 * (cos + sin)
    else:
        both = 2 * (g1 * cos + g2 * sin)
        want_q, want_t = torch.cat((both * a, both * b), dim=-1), w1 * cos + w2 * sin
    assert_close(dq, want_q, tolerances.FLOAT64)
    assert_close(dt, want_t, tolerances.FLOAT64)


@pytest.mark.parametrize("form", FORMS)
def test_shared_heads_equal_repeated_ones(form: str) -> None:
    q, t, v = _inputs(6, 6, heads=4, groups=1)
    cos, sin = table(torch.arange(6).expand(2, -1), 8)
    shared = collinear_attention(q, t, v, cos, sin, form=form)
    repeated = collinear_attention(q, t.expand(-1, -1, 4, -1), v.expand(-1, -1, 4, -1), cos, sin, form=form)
    assert_close(shared, repeated, tolerances.FLOAT64)


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), form=st.sampled_from(FORMS), causal=st.booleans())
def test_packed_documents_equal_separate_ones(lengths: list[int], form: str, causal: bool) -> None:
    q, t, v = (x[:1] for x in _inputs(sum(lengths), sum(lengths)))
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    cos, sin = table(places, 8)
    packed = collinear_attention(q, t, v, cos, sin, form=form, causal=causal, cu_seqlens=boundaries(lengths))
    pieces = [x.split(lengths, dim=1) for x in (q, t, v, cos, sin)]
    alone = [
        collinear_attention(*piece, form=form, causal=causal) for piece in zip(*pieces, strict=True) if piece[0].numel()
    ]
    if alone:
        assert_close(packed, torch.cat(alone, dim=1), tolerances.FLOAT64)


def test_a_token_without_coefficients_is_still_seen() -> None:
    """All t = 0 is the score 0, not −∞."""
    q, t, v = _inputs(3, 3)
    out = collinear_attention(q, torch.zeros_like(t), v, *table(torch.arange(3).expand(2, -1), 8), causal=False)
    assert_close(out[:, 0, 0], v.mean(1)[:, 0], tolerances.FLOAT64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transform_is_rounded_once(form: str, dtype: torch.dtype) -> None:
    frequencies, _ = rope_frequencies(64, {}, 2048, 0)
    cos, sin = rotary_table(torch.arange(100_000, 100_016)[None], frequencies)
    q, t = torch.randn(1, 16, 2, 64).to(dtype), torch.rand(1, 16, 2, 32).to(dtype)
    for transform, x, option in ((collinear_query, q, {"scale": 0.125}), (collinear_key, t, {"tie": "rotary"})):
        rounded = transform(x, cos, sin, form=form, **option)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, transform(x.float(), cos, sin, form=form, **option).to(dtype))


def test_large_queries_do_not_overflow_float16() -> None:
    q = torch.full((1, 1, 1, 64), 500.0, dtype=torch.float16)  # q² is beyond 65504, q²/8 is not
    t, v = torch.ones(1, 1, 1, 32, dtype=torch.float16), torch.ones(1, 1, 1, 4, dtype=torch.float16)
    cos, sin = torch.ones(1, 1, 32), torch.zeros(1, 1, 32)
    assert collinear_query(q, cos, sin, form="slack", scale=0.125).isfinite().all()
    assert collinear_attention(q, t, v, cos, sin).dtype == torch.float16


@pytest.mark.parametrize("form", FORMS)
def test_sixteen_bits_stay_close_to_float32(form: str) -> None:
    q, t, places = make(length=40, width=16)
    v = torch.randn(2, 40, 2, 16, dtype=torch.float64)
    want = collinear_attention(0.7 * q, t, v, *table(places, 16), form=form, backend="reference")
    got = collinear_attention(*(x.bfloat16() for x in (0.7 * q, t, v)), *table(places, 16), form=form)
    assert_close(got, want, 3 * tolerances.BFLOAT16)  # q is rounded and squared, t is rounded, so is their product


def test_statistics_of_fresh_weights() -> None:
    """Scaled scores of random normalised inputs start positive and fall with the distance, less so when slack."""
    width, channels, count = 1024, 64, 512
    x = torch.randn(count, width, dtype=torch.float32)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    q, raw = (x @ (0.02 * torch.randn(width, 8 * channels)) for _ in range(2))
    q, t = q.reshape(1, count, 8, channels), collinear_coefficients(raw.reshape(1, count, 8, channels))
    assert q.square().mean().item() == pytest.approx(0.41, rel=0.05)
    assert t.mean().item() == pytest.approx(0.18, rel=0.05)
    frequencies, _ = rope_frequencies(channels, {}, 2048, 0)

    def mean_score(form: str, m: int, n: int) -> float:
        query = collinear_query(q, *rotary_table(torch.full((1, count), m), frequencies), form=form, scale=0.125)
        key = collinear_key(t, *rotary_table(torch.full((1, count), n), frequencies), form=form, tie="rotary")
        return torch.einsum("bthk,bshk->h", query, key).mean().item() / count**2

    for (m, n), want in {(0, 0): 0.583, (500, 490): 0.385, (500, 400): 0.329, (500, 0): 0.116}.items():
        assert mean_score("strict", m, n) == pytest.approx(want, abs=0.04)
    for (m, n), want in {
        (0, 0): 0.583,
        (10, 10): 0.466,
        (500, 500): 0.374,
        (500, 490): 0.257,
        (500, 400): 0.191,
    }.items():
        assert mean_score("slack", m, n) == pytest.approx(want, abs=0.04)


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        ({"t": (1, 3, 2, 8)}, {}, ShapeError, r"t has shape .* expected \[B, S, G, K/2\]"),
        ({"v": (1, 4, 2, 5)}, {}, ShapeError, "v has shape"),
        ({"cos": (1, 3, 3)}, {}, ShapeError, "sin has shape"),
        ({"cos": (1, 3, 5), "sin": (1, 3, 5)}, {}, ShapeError, "K=8 channels cannot hold"),
        ({"q": (1, 3, 4, 7), "t": (1, 3, 2, 3)}, {}, ShapeError, "K must be even"),
        ({"q": (1, 5, 4, 8)}, {}, ShapeError, "S=3 keys are too few for T=5"),
        ({"q": (1, 3, 3, 8)}, {}, ShapeError, "cannot share G=2"),
        ({}, {"form": "loose"}, ConfigError, "form='loose' is not known"),
        ({}, {"tie": "none"}, ConfigError, "tie='none' is not known"),
        (
            {"cos": (1, 3, 2), "sin": (1, 3, 2)},
            {"form": "strict", "tie": "head"},
            ConfigError,
            "needs tied rotary pairs",
        ),
        ({}, {"window": 0}, ConfigError, "window=0"),
        ({}, {"backend": "cuda"}, ConfigError, "backend='cuda' is not known"),
    ],
)
def test_bad_calls(change: dict, options: dict, error: type[Exception], words: str) -> None:
    shapes = {"q": (1, 3, 4, 8), "t": (1, 3, 2, 4), "v": (1, 3, 2, 5), "cos": (1, 3, 4), "sin": (1, 3, 4)} | change
    with pytest.raises(error, match=words):
        collinear_attention(*(torch.zeros(shape) for shape in shapes.values()), **options)


@pytest.mark.parametrize(("width", "rotary_dim"), [(7, None), (8, 3), (8, 10)])
def test_bad_pairs(width: int, rotary_dim: int | None) -> None:
    with pytest.raises(ShapeError, match="cannot be tied in pairs"):
        collinear_coefficients(torch.zeros(1, 3, 2, width), rotary_dim)
