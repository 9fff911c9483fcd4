"""MetaLA attention: forms agree, and the properties that its paper claims hold."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from farspan.errors import ConfigError
from farspan.ops import gated_linear_attention, metala_attention
from tests import tolerances
from tests.ops.checks import Named, assert_close, assert_same, boundaries, cast, outputs_and_gradients


def make(
    length: int,
    *,
    batch: int = 2,
    heads: int = 2,
    width: int = 5,
    value_width: int = 7,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Named:
    """Random inputs."""
    generator = torch.Generator().manual_seed(length)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    tensors: Named = {
        "q": randn(batch, length, heads, width),
        "gate_logits": 3 * randn(batch, length, heads, width),
        "v": randn(batch, length, heads, value_width),
        "augmentation": randn(heads, width),
        "key": None,
        "initial_state": randn(batch if sequences is None else sequences, heads, width, value_width),
    }
    return cast(tensors, dtype)


def attend(backend: str, **options: object) -> partial:
    return partial(metala_attention, output_final_state=True, backend=backend, **options)


OPTIONS = {
    "released": {},
    "plain": {"normalize": False, "scale": 1.0, "decay_normalizer": 1.0},
    "outside": {"augmentation_inside": False, "norm_eps": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("length", [1, 5, 77])
@pytest.mark.parametrize("own_key", [False, True])
def test_torch_matches_reference(length: int, options: dict[str, object], own_key: bool) -> None:
    x = make(length)
    if own_key:
        x["key"] = torch.randn_like(x["q"])
    want = outputs_and_gradients(attend("reference", **options), x)
    assert_same(outputs_and_gradients(attend("torch", **options), x), want, tolerances.FLOAT64)
    assert_same(outputs_and_gradients(attend("torch", **options), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_reference_is_the_formula() -> None:
    x = make(4, batch=1)
    out, state = attend("reference")(**x)
    decay = torch.sigmoid(x["gate_logits"][0]) ** (1 / 16)
    for head in range(2):
        want_state = x["initial_state"][0, head]
        for t in range(4):
            key, v = 1 - decay[t, head], x["v"][0, t, head]
            want_state = decay[t, head][:, None] * want_state + key[:, None] * v
            u = (x["q"][0, t, head] * key * x["augmentation"][head]).sum()
            o = 5**-0.5 * x["q"][0, t, head] @ want_state + torch.sigmoid(u * v)
            want = (o - o.mean()) / (o.var(correction=0) + 1e-5).sqrt()
            assert_close(out[0, t, head], want, tolerances.FLOAT64)
        assert_close(state[0, head], want_state, tolerances.FLOAT64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_equal_finite_differences(backend: str) -> None:
    x = make(4, batch=1)
    del x["key"]
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    call = attend(backend)
    assert torch.autograd.gradcheck(lambda *t: call(**dict(zip(x, t, strict=True))), leaves, atol=tolerances.GRADCHECK)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("normalizer", [16.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates_stay_finite(backend: str, normalizer: float, dtype: torch.dtype) -> None:
    x = make(70, dtype=dtype)
    x["initial_state"] = x["initial_state"].float()
    choices = torch.tensor([-1e3, -50.0, 0.0, 50.0, 1e3])
    x["gate_logits"] = choices[torch.randint(5, x["q"].shape)].to(dtype)
    for name, tensor in outputs_and_gradients(attend(backend, decay_normalizer=normalizer), x).items():
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("lengths", [[40, 0, 1, 33], [0, 64, 0]])
def test_packed_documents_equal_separate_ones(lengths: list[int]) -> None:
    x = make(sum(lengths), batch=1, sequences=len(lengths))
    cu_seqlens = boundaries(lengths)
    want = outputs_and_gradients(attend("reference", cu_seqlens=cu_seqlens), x)
    assert_same(outputs_and_gradients(attend("torch", cu_seqlens=cu_seqlens), x), want, tolerances.FLOAT64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(seed=st.integers(0, 1000))
def test_padding_anywhere_has_no_effect(backend: str, seed: int) -> None:
    x = make(24)
    keep = torch.rand(2, 24, generator=torch.Generator().manual_seed(seed)) < 0.6
    keep[:, 3] = True
    out, state = attend(backend, padding_mask=keep.long())(**x)
    for row in range(2):
        names = ("q", "gate_logits", "v")
        dense = {name: tensor[row : row + 1, keep[row]] for name, tensor in x.items() if name in names}
        dense |= {"augmentation": x["augmentation"], "initial_state": x["initial_state"][row : row + 1]}
        want, want_state = attend(backend)(**dense)
        assert_close(out[row : row + 1, keep[row]], want, tolerances.FLOAT64)
        assert_close(state[row : row + 1], want_state, tolerances.FLOAT64)


@given(logits=st.lists(st.floats(-20, 20), min_size=2, max_size=40))
def test_any_softmax_row_is_reached(logits: list[float]) -> None:
    """With K = 1 and q = 1 the decays `S_{t-1} / S_t` of the cumulative row S make the last output that softmax row."""
    row = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    log_sums = torch.logcumsumexp(torch.tensor(logits, dtype=torch.float64), 0)
    log_decay = torch.cat([log_sums.new_full((1,), -torch.inf), log_sums[:-1] - log_sums[1:]]).clamp(max=0)
    log_decay = log_decay.reshape(1, -1, 1, 1)
    values = torch.eye(len(logits), dtype=torch.float64).reshape(1, len(logits), 1, len(logits))
    ones = torch.ones_like(log_decay)
    for backend in ("reference", "torch"):
        out, _ = gated_linear_attention(ones, -torch.expm1(log_decay), values, log_decay, scale=1.0, backend=backend)
        assert_close(out[0, -1, 0], row, tolerances.FLOAT64)


@given(spread=st.floats(0, 100), length=st.integers(1, 80))
def test_state_is_a_moving_average(spread: float, length: int) -> None:
    x = make(length)
    del x["initial_state"]
    x["gate_logits"] = x["gate_logits"] * spread
    _, state = attend("torch")(**x)
    assert (state.abs() <= x["v"].abs().amax(dim=1).unsqueeze(-2) * (1 + 1e-12)).all()
    constant = torch.full_like(x["v"], 3.0)
    _, state = attend("torch")(**x | {"v": constant})
    kept = (F.logsigmoid(x["gate_logits"]) / 16).sum(1).exp()
    assert_close(state, 3.0 * (1 - kept).unsqueeze(-1).expand_as(state), tolerances.FLOAT64)


def test_limits_of_the_gate() -> None:
    x = make(20)
    _, frozen = attend("torch")(**x | {"gate_logits": torch.full_like(x["q"], 1e3)})
    assert torch.equal(frozen, x["initial_state"])
    _, replaced = attend("torch", decay_normalizer=1.0)(**x | {"gate_logits": torch.full_like(x["q"], -1e3)})
    assert_close(replaced, x["v"][:, -1].unsqueeze(-2).expand_as(replaced), tolerances.FLOAT64)


def test_augmentation_of_zero_changes_nothing_but_learns() -> None:
    x = make(9)
    without, _ = attend("torch")(**x | {"augmentation": None})
    x["augmentation"] = torch.zeros(2, 5, dtype=torch.float64)
    results = outputs_and_gradients(attend("torch"), x)
    # The normalisation's epsilon is the same, so removing the mean removes the constant 0.5 exactly.
    assert_close(results["out"], without, tolerances.FLOAT64)
    assert results["d_augmentation"].abs().max() > 1e-4


def test_state_is_float32_for_sixteen_bit_inputs() -> None:
    out, state = attend("torch")(**cast(make(40), torch.bfloat16) | {"initial_state": None})
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_normalizer_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"decay_normalizer=0.0 must be positive"):
        attend("auto", decay_normalizer=0.0)(**make(3))
