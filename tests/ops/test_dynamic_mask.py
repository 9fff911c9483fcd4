"""Dynamic mask attention: the definition is the formula, every form is the definition, selections are as described."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import farspan.ops.dynamic_mask.torch as fast
from farspan.errors import ConfigError, ShapeError
from farspan.ops import dynamic_mask_attention
from farspan.ops.dynamic_mask.blocks import block_length, live_slots
from farspan.ops.dynamic_mask.expiry import expiry, in_blocks, in_window, lanes_of_blocks, predecessors
from farspan.ops.dynamic_mask.reference import Selection, kept_keys
from farspan.ops.softmax.api import softmax_attention
from tests import tolerances
from tests.ops.checks import assert_close, boundaries

SELECTIONS = ("none", "topk_causal", "topk_global", "relu")


@pytest.fixture
def no_short_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes reach the forms that serve long sequences."""
    monkeypatch.setattr(fast, "SHORT", 0)


def make(
    queries: int,
    past: int = 0,
    heads: tuple[int, int, int] = (4, 2, 2),
    batch: int = 2,
    tied: bool = False,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v and a bias per key, with gradients."""
    query_heads, key_heads, bias_heads = heads
    keys = queries + past
    bias = torch.randn(batch, keys, bias_heads, dtype=dtype)
    shapes = ((batch, queries, query_heads, 4), (batch, keys, key_heads, 4), (batch, keys, key_heads, 3))
    tensors = [*(torch.randn(shape, dtype=dtype) for shape in shapes), bias.round() if tied else bias]
    return [x.requires_grad_() for x in tensors]


def forms_agree(tensors: list[Tensor], **options: Any) -> Tensor:
    """The fast form equals the definition, forward and gradient."""
    outs = [dynamic_mask_attention(*tensors, backend=backend, **options) for backend in ("reference", "torch")]
    assert_close(outs[1], outs[0], tolerances.FLOAT64)
    if outs[0].numel():
        cotangent = torch.randn_like(outs[0])
        gradients = [torch.autograd.grad((out * cotangent).sum(), tensors) for out in outs]
        for name, got, want in zip(("q", "k", "v", "bias"), gradients[1], gradients[0], strict=True):
            assert_close(got, want, tolerances.FLOAT64, f"gradient of {name}", largest=want.new_ones(()))
    return outs[0]


def kept(bias: Tensor, queries: int, **options: Any) -> Tensor:
    return kept_keys(bias, queries, Selection(**{"keep": 3, **options}))


def expiry_by_definition(bias: Tensor, keep: int) -> Tensor:
    """`[S]`, from the count of better keys in every prefix."""
    length = len(bias)
    place = torch.arange(length)
    better = (bias > bias[:, None]) | ((bias == bias[:, None]) & (place > place[:, None]))
    gone = (better.cumsum(1, dtype=torch.int32) >= keep) & (place >= place[:, None])
    return torch.where(gone.any(1), gone.int().argmax(1), length)


# --- the definition ---


@pytest.mark.parametrize("select", SELECTIONS)
def test_reference_is_the_formula(select: str) -> None:
    length, keep = 7, 3
    q, k, v, bias = (x.detach() for x in make(length, heads=(2, 1, 1), batch=1, tied=True))
    out = dynamic_mask_attention(q, k, v, bias, select=select, keep=keep, backend="reference")

    def best(places: list[int]) -> list[int]:
        return sorted(places, key=lambda j: (float(bias[0, j, 0]), j))[-keep:]

    for i in range(length):
        seen = list(range(i + 1))
        if select == "topk_causal":
            seen = best(seen)
        elif select == "topk_global":
            seen = [j for j in best(list(range(length))) if j <= i]
        elif select == "relu":
            seen = [j for j in seen if bias[0, j, 0] > 0]
        for head in range(2):
            weights = [math.exp(float(q[0, i, head] @ k[0, j, 0]) / 2 + float(bias[0, j, 0])) for j in seen]
            total = sum(weights) or 1.0
            want = sum((w / total * v[0, j, 0] for w, j in zip(weights, seen, strict=True)), torch.zeros(3).double())
            assert_close(out[0, i, head], want, tolerances.FLOAT64, largest=want.new_ones(()))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("select", ["topk_causal", "relu"])
def test_gradcheck_of_the_reference(select: str, per_row: bool) -> None:
    q, k, v, bias = make(4, heads=(2, 1, 2), batch=1)
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True) if per_row else bias
    call = lambda *x: dynamic_mask_attention(*x, select=select, keep=2, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v, bias), atol=tolerances.GRADCHECK)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_zero_bias_and_a_wide_window_are_plain_attention(backend: str) -> None:
    q, k, v, bias = make(150, dtype=torch.float32)
    for keep in (150, 1000):
        out = dynamic_mask_attention(q, k, v, torch.zeros_like(bias), keep=keep, backend=backend)
        assert_close(out, softmax_attention(q, k, v), tolerances.FLOAT32_STEP)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_wide_window_selects_nothing(backend: str) -> None:
    tensors = make(140)
    want = dynamic_mask_attention(*tensors, select="none", backend=backend)
    assert_close(dynamic_mask_attention(*tensors, keep=140, backend=backend), want, tolerances.FLOAT64)


# --- the selection ---


@given(length=st.integers(1, 30), keep=st.integers(1, 12), tied=st.booleans())
def test_every_row_keeps_its_best_and_an_evicted_key_never_returns(length: int, keep: int, tied: bool) -> None:
    bias = make(length, tied=tied)[3]
    rows = kept(bias, length, keep=keep)
    counts = torch.arange(1, length + 1).clamp(max=keep)
    assert torch.equal(rows.sum(-1), counts.expand(rows.shape[:3]))
    born = torch.eye(length, dtype=torch.bool)[1:]
    assert not (rows[:, :, 1:] & ~rows[:, :, :-1] & ~born).any()


def test_selection_ignores_shifts_keeps_positive_scales_and_turns_with_the_sign() -> None:
    bias = make(20)[3].detach()
    assert torch.equal(kept(bias + 7.5, 20), kept(bias, 20))
    assert torch.equal(kept(3.0 * bias, 20), kept(bias, 20))
    order = bias.argsort(1)
    lowest = kept(-bias, 20)[:, :, -1]
    assert torch.equal(lowest.transpose(1, 2).nonzero()[:, 1].sort().values, order[:, :3].flatten().sort().values)


def test_a_constant_on_all_biases_changes_nothing(no_short_form: None) -> None:
    q, k, v, bias = make(40)
    for select in ("none", "topk_causal", "topk_global"):
        plain, shifted = (dynamic_mask_attention(q, k, v, b, select=select, keep=5) for b in (bias, bias + 4.0))
        assert_close(shifted, plain, tolerances.FLOAT64)


def test_of_equal_biases_the_more_recent_is_kept() -> None:
    rows = kept(torch.zeros(1, 6, 1), 6, keep=2)[0, 0]
    assert torch.equal(rows, torch.ones(6, 6).tril().triu(-1).bool())


def test_smoothing_keeps_a_block_with_more_than_half_of_its_keys() -> None:
    bias = torch.tensor([1.0, 1, 1, -1, 1, 1, -1, -1, -1, 1]).reshape(1, 10, 1)
    rows = kept(bias, 10, select="relu", block_size=4, causal=False)
    assert rows[0, 0, 0].tolist() == [True] * 4 + [False] * 6  # 3 of 4; 2 of 4; 1 of the last 2
    rows = kept(bias[:, :9] + 2 * (torch.arange(9) == 8)[None, :, None], 9, select="relu", block_size=4)
    assert rows[0, 0, -1].tolist() == [True] * 4 + [False] * 4 + [True]
    assert rows[0, 0, 1].tolist() == [True] * 2 + [False] * 7  # causality applies last


def test_ranking_decides_and_bias_weighs() -> None:
    q, k, v, bias = make(30)
    ranking = torch.randn_like(bias)
    rows = kept(ranking, 30, keep=4).repeat_interleave(2, dim=1)
    hidden = torch.zeros(rows.shape, dtype=torch.float64).masked_fill(~rows, -math.inf)
    want = dynamic_mask_attention(q, k, v, bias.mT.unsqueeze(2).repeat_interleave(2, 1) + hidden, select="none")
    for backend in ("reference", "torch"):
        out = dynamic_mask_attention(q, k, v, bias, ranking=ranking, keep=4, backend=backend)
        assert_close(out, want, tolerances.FLOAT64)


@pytest.mark.parametrize("options", [{}, {"window": 30}, {"select": "topk_global"}], ids=str)
def test_a_ranking_of_minus_infinity_comes_last_and_hides_nothing(options: dict[str, Any], no_short_form: None) -> None:
    tensors = make(50)
    ranking = torch.randn_like(tensors[3])
    ranking[:, ::3] = -math.inf
    with torch.no_grad():
        tensors[3][:, 1:40:2] = -math.inf
    forms_agree(tensors, ranking=ranking, keep=12, **options)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("select", ["none", "topk_causal", "relu"])
def test_future_does_not_change_past(select: str, backend: str, no_short_form: None) -> None:
    q, k, v, bias = (x.detach() for x in make(60))
    before = dynamic_mask_attention(q, k, v, bias, select=select, keep=7, backend=backend)
    for x in (q, k, v, bias):
        x[:, 40:] = 9.0
    after = dynamic_mask_attention(q, k, v, bias, select=select, keep=7, backend=backend)
    assert_close(after[:, :40], before[:, :40], tolerances.FLOAT64)


def test_unselected_keys_have_a_bias_gradient_of_exactly_zero(no_short_form: None) -> None:
    q, k, v, bias = make(50, heads=(4, 2, 2))
    row = 45
    for backend in ("reference", "torch"):
        out = dynamic_mask_attention(q, k, v, bias, keep=6, backend=backend)
        (gradient,) = torch.autograd.grad(out[:, row].square().sum(), bias)
        rows = kept(bias, 50, keep=6)[:, :, row].transpose(1, 2)
        assert (gradient[~rows] == 0).all() and (gradient[rows] != 0).all()


# --- the fast forms ---


@given(
    queries=st.integers(1, 90),
    past=st.sampled_from([0, 0, 5, 70]),
    keep=st.sampled_from([1, 2, 7, 40, 200]),
    heads=st.sampled_from([(4, 2, 2), (4, 2, 4), (4, 4, 2), (2, 1, 1), (4, 2, 1)]),
    select=st.sampled_from(["topk_causal", "topk_global"]),
    causal=st.booleans(),
    tied=st.booleans(),
    masked=st.booleans(),
)
def test_keys_that_are_kept_equal_the_definition(
    queries: int,
    past: int,
    keep: int,
    heads: tuple[int, int, int],
    select: str,
    causal: bool,
    tied: bool,
    masked: bool,
) -> None:
    options: dict[str, Any] = {"select": select, "keep": keep, "causal": causal}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "SHORT", 0)
        mask = torch.rand(2, queries + past) > 0.4 if masked else None
        forms_agree(make(queries, past, heads, tied=tied), key_mask=mask, **options)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    keep=st.sampled_from([1, 3, 12, 50]),
    select=st.sampled_from(SELECTIONS),
    window=st.sampled_from([None, None, 5]),
    causal=st.booleans(),
)
def test_packed_documents_equal_separate_ones(
    lengths: list[int], keep: int, select: str, window: int | None, causal: bool
) -> None:
    options: dict[str, Any] = {"select": select, "keep": keep, "window": window, "causal": causal}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "SHORT", 0)
        tensors = make(sum(lengths), batch=1, tied=True)
        out = forms_agree(tensors, cu_seqlens=boundaries(lengths), **options)
        parts = zip(*(x.split(lengths, 1) for x in tensors), strict=True)
        alone = [dynamic_mask_attention(*part, **options) for part in parts]
    assert_close(out, torch.cat(alone, dim=1), tolerances.FLOAT64)


@given(
    select=st.sampled_from(SELECTIONS),
    window=st.sampled_from([None, 1, 9]),
    block_size=st.sampled_from([None, 4]),
    past=st.sampled_from([0, 6]),
    causal=st.booleans(),
    masked=st.booleans(),
    per_row=st.booleans(),
    pieces=st.sampled_from([3, 8, 1000]),
)
def test_every_combination_equals_the_definition(
    select: str,
    window: int | None,
    block_size: int | None,
    past: int,
    causal: bool,
    masked: bool,
    per_row: bool,
    pieces: int,
) -> None:
    """Windows with selections, smoothing, padding, a bias per query row: fast where it can be, defined everywhere."""
    queries, keys = 20, 20 + past
    tensors = make(queries, past, tied=True)
    if per_row:
        tensors[3] = torch.randn(2, 2, queries, keys, dtype=torch.float64).round().requires_grad_()
    with torch.no_grad():
        tensors[3][:, ..., 3:5] = -math.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "SHORT", 0)
        patch.setitem(fast.DEFINED_AT_ONCE, "cpu", pieces * keys * 8)
        forms_agree(
            tensors,
            select=select,
            keep=4,
            window=window,
            block_size=None if select == "none" else block_size,
            causal=causal,
            key_mask=torch.rand(2, keys) > 0.3 if masked else None,
        )


def test_a_bias_per_row_keeps_no_tensor_of_its_size_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = make(32)
    bias = torch.randn(2, 2, 32, 32, dtype=torch.float64, requires_grad=True)
    kept_tensors: list[Tensor] = []

    def largest(most: int) -> int:
        monkeypatch.setitem(fast.DEFINED_AT_ONCE, "cpu", most)
        kept_tensors.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept_tensors.append(x) or x, lambda x: x):
            dynamic_mask_attention(q, k, v, bias, keep=4)
        return max(
            x.numel() for x in kept_tensors if x.untyped_storage().data_ptr() != bias.untyped_storage().data_ptr()
        )

    assert largest(4 * 32 * q.shape[2] * 2) <= max(x.numel() for x in (q, k, v)) < 32 * 32 * 2 <= largest(1 << 30)


def test_a_bias_per_row_that_repeats_is_a_bias_per_key() -> None:
    q, k, v, bias = make(20)
    per_row = bias.transpose(1, 2).unsqueeze(2).expand(-1, -1, 20, -1)
    for select in SELECTIONS:
        outs = [dynamic_mask_attention(q, k, v, b, select=select, keep=4) for b in (bias, per_row)]
        assert_close(outs[1], outs[0], tolerances.FLOAT64)


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_query_without_keys_gives_zero(select: str, backend: str, no_short_form: None) -> None:
    q, k, v, _ = make(5, batch=1)
    bias = torch.full((1, 5, 2), -math.inf, dtype=torch.float64)
    bias[:, 2:] = 1.0
    bias.requires_grad_()
    out = dynamic_mask_attention(q, k, v, bias, select=select, keep=3, backend=backend)
    assert (out[:, :2] == 0).all() and (out[:, 2:] != 0).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v, bias)):
        assert gradient.isfinite().all()


def test_extreme_biases_stay_finite(no_short_form: None) -> None:
    q, k, v, bias = make(40, dtype=torch.float32)
    for scale in (1e4, 5e34):
        for select in ("none", "topk_causal"):
            out = dynamic_mask_attention(q, k, v, bias * scale, select=select, keep=5)
            assert out.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v, bias)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("select", SELECTIONS)
def test_half_precision_keeps_the_bias_in_full(dtype: torch.dtype, select: str, no_short_form: None) -> None:
    q, k, v, bias = (x.detach() for x in make(64, dtype=torch.float32))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    bias = 30.0 + bias  # whose differences 8 bits would not hold
    out = dynamic_mask_attention(q, k, v, bias, select=select, keep=9)
    assert out.dtype == dtype
    exact = dynamic_mask_attention(q.double(), k.double(), v.double(), bias.double(), select=select, keep=9)
    assert_close(out, exact, tolerances.BFLOAT16)


# --- expiry ---


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 500, 1000])
@pytest.mark.parametrize("keep", [1, 3, 64, 256])
@pytest.mark.parametrize("kind", ["random", "tied", "equal", "rising", "falling"])
def test_expiry_equals_the_count_of_better_keys(length: int, keep: int, kind: str) -> None:
    bias = torch.randn(1, length, 2)
    bias = {
        "random": bias,
        "tied": (2 * bias).round(),
        "equal": torch.zeros_like(bias),
        "rising": bias.sort(1).values,
        "falling": bias.sort(1, descending=True).values,
    }[kind]
    expires = expiry(bias, keep)
    assert expires.dtype == torch.int32
    for head in range(2):
        assert torch.equal(expires[0, :, head].long(), expiry_by_definition(bias[0, :, head], keep))


@pytest.mark.parametrize("tied", [False, True])
def test_expiry_equals_the_count_of_better_keys_at_4096(tied: bool) -> None:
    bias = torch.randn(1, 4096, 1)
    bias = (2 * bias).round() if tied else bias
    assert torch.equal(expiry(bias, 256)[0, :, 0].long(), expiry_by_definition(bias[0, :, 0], 256))


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5), keep=st.integers(1, 20))
def test_expiry_restarts_with_every_document(lengths: list[int], keep: int) -> None:
    bias = torch.randn(1, sum(lengths), 1).round()
    expires = expiry(bias, keep, boundaries(lengths))[0, :, 0]
    starts = boundaries(lengths).tolist()
    for start, part, own in zip(starts, expires.split(lengths), bias[0, :, 0].split(lengths), strict=False):
        if len(part):
            assert torch.equal(part.long() - start, expiry_by_definition(own, keep))


@given(length=st.integers(1, 40), keep=st.integers(1, 12), tied=st.booleans())
def test_expiry_describes_the_selection(length: int, keep: int, tied: bool) -> None:
    bias = make(length, tied=tied)[3].detach()
    expires = expiry(bias, keep).transpose(1, 2).unsqueeze(2)
    row, place = torch.arange(length)[:, None], torch.arange(length)
    assert torch.equal((place <= row) & (row < expires), kept(bias, length, keep=keep))


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    keep=st.integers(1, 12),
    window=st.integers(1, 50),
    tied=st.booleans(),
)
def test_ranks_and_limits_describe_the_selection_in_a_window(
    lengths: list[int], keep: int, window: int, tied: bool
) -> None:
    length, bounds = sum(lengths), boundaries(lengths)
    bias = make(length, batch=1, tied=tied)[3].detach()
    expires, ranks, limits = (x.transpose(1, 2) for x in in_window(bias, keep, window, bounds))
    row, place = torch.arange(length)[:, None], torch.arange(length)
    selected = (place <= row) & (row < expires.unsqueeze(2)) & (ranks.unsqueeze(2) >= limits.unsqueeze(3))
    assert torch.equal(selected, kept(bias, length, keep=keep, window=window, cu_seqlens=bounds))


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    keep=st.integers(1, 12),
    size=st.integers(1, 9),
    tied=st.booleans(),
)
def test_ranks_and_limits_describe_the_smoothed_selection(lengths: list[int], keep: int, size: int, tied: bool) -> None:
    length, bounds = sum(lengths), boundaries(lengths)
    bias = make(length, batch=1, tied=tied)[3].detach()
    bias[:, 3::7] = -math.inf
    hidden = bias.isneginf()
    lives, ranks, limits = (
        x.transpose(1, 2) for x in in_blocks(expiry(bias, keep, bounds).masked_fill(hidden, 0), size, bounds)
    )
    row, place = torch.arange(length)[:, None], torch.arange(length)
    alive = (place <= row) & (row < lives.unsqueeze(2))
    selected = alive & (ranks.unsqueeze(2) >= limits.unsqueeze(3)) & ~hidden.transpose(1, 2).unsqueeze(2)
    assert torch.equal(selected, kept(bias, length, keep=keep, block_size=size, cu_seqlens=bounds))

    starts = boundaries(lengths)[:-1].repeat_interleave(torch.tensor(lengths))
    lanes = lanes_of_blocks(keep, size, length)
    for ends, before in zip(lives[0], predecessors(lives[0], lanes, starts), strict=True):
        lane: list[int] = []
        for key, former in enumerate(before.tolist()):
            lane.append(key - int(starts[key]) if former == key else lane[former])
            assert former == key or ends[former] <= key, "a lane has two keys at once"
        assert max(lane, default=0) < max(lanes, 1)
        formers = [former for key, former in enumerate(before.tolist()) if former != key]
        assert len(set(formers)) == len(formers), "two keys come in the place of one"


def test_blocks_list_exactly_the_live_keys() -> None:
    length, keep, size = 50, 5, 8
    bias = torch.randn(1, length, 1)
    expires = expiry(bias, keep)[..., 0]
    slots = live_slots(expires, torch.zeros(length, dtype=torch.int32), None, keep, first_row=0, blocks=7, size=size)
    assert slots.shape == (1, 7, keep + size)
    for block, listed in enumerate(slots[0, :, :keep].tolist()):
        begin = block * size
        alive = {j for j in range(begin) if expires[0, j] > begin}
        listed_keys = {j for j in listed if j >= 0}
        assert alive <= listed_keys and len(listed_keys) <= keep
    assert block_length(8192, 256) == 128


def test_empty_sequences() -> None:
    for backend in ("reference", "torch"):
        out = dynamic_mask_attention(*make(0), backend=backend)
        assert out.shape == (2, 0, 4, 3)
    assert expiry(torch.zeros(1, 0, 2), 3).shape == (1, 0, 2)


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        ({"bias": (2, 5, 3)}, {}, ShapeError, "M=3 bias heads do not fit H=4"),
        ({"bias": (2, 4, 2)}, {}, ShapeError, "bias has shape"),
        ({"k": (2, 5, 3, 4), "v": (2, 5, 3, 4)}, {}, ShapeError, "cannot share G=3"),
        ({"k": (2, 3, 2, 4), "v": (2, 3, 2, 4), "bias": (2, 3, 2)}, {}, ShapeError, "S=3 keys are too few"),
        ({}, {"select": "topk"}, ConfigError, "select='topk' is not known"),
        ({}, {"keep": 0}, ConfigError, "keep=0 must be at least 1"),
        ({}, {"window": 0}, ConfigError, "window=0 must be at least 1"),
        ({}, {"block_size": 4, "select": "none"}, ConfigError, "smooths a selection"),
        ({}, {"key_mask": torch.ones(2, 5)}, ShapeError, "boolean or integer mask"),
        ({}, {"backend": "cuda"}, ConfigError, "backend='cuda'"),
    ],
)
def test_bad_calls(change: dict, options: dict, error: type[Exception], words: str) -> None:
    shapes = {"q": (2, 5, 4, 4), "k": (2, 5, 2, 4), "v": (2, 5, 2, 4), "bias": (2, 5, 2), **change}
    with pytest.raises(error, match=words):
        dynamic_mask_attention(**{name: torch.zeros(shape) for name, shape in shapes.items()}, **options)
