"""State space duality: forms agree with the formula, and its limits are what they should be."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from farspan.errors import ConfigError, ShapeError
from farspan.nn.positions import apply_rotary, rotary_table
from farspan.ops import state_space_duality, varlen
from tests import tolerances
from tests.ops.checks import Named, assert_close, assert_same, boundaries, cast, outputs_and_gradients

BACKENDS = ["reference", "torch"]


def make(length: int, *, batch: int = 2, groups: int = 2, sequences: int | None = None) -> Named:
    """Random float64 inputs with four heads, V = 5 and K = 3."""
    generator = torch.Generator().manual_seed(length)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    return {
        "x": randn(batch, length, 4, 5),
        "dt": randn(batch, length, 4),
        "a": -randn(4).exp(),
        "b": randn(batch, length, groups, 3),
        "c": randn(batch, length, groups, 3),
        "d": randn(4),
        "dt_bias": randn(4),
        "initial_state": randn(batch if sequences is None else sequences, 4, 3, 5),
    }


def attend(backend: str, **options: object) -> partial:
    return partial(state_space_duality, output_final_state=True, backend=backend, **options)


def steps(x: Named) -> Tensor:
    return F.softplus(x["dt"] + x["dt_bias"])


OPTIONS = {
    "plain": {},
    "limits": {"dt_limit": (0.5, 1.0)},
    "no_softplus": {"dt_softplus": False, "dt_limit": (0.0, 2.0)},
}
EXTREMES = {
    "growing": {"a": 0.2},
    "forgetful": {"a": -1e3},
    "large steps": {"dt": 60.0},
    "small steps": {"dt": -60.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("length", [1, 5, 77])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_torch_matches_reference(length: int, groups: int, options: dict[str, object]) -> None:
    x = make(length, groups=groups)
    want = outputs_and_gradients(attend("reference", **options), x)
    assert_same(outputs_and_gradients(attend("torch", **options), x), want, tolerances.FLOAT64)
    assert_same(outputs_and_gradients(attend("torch", **options), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_is_the_formula(backend: str) -> None:
    x = make(6, batch=1)
    out, state = attend(backend, dt_limit=(0.1, 1.5))(**x)
    for head in range(4):
        want_state, group = x["initial_state"][0, head], head // 2
        for t in range(6):
            step = torch.log1p((x["dt"][0, t, head] + x["dt_bias"][head]).exp()).clamp(0.1, 1.5)
            v, b, c = x["x"][0, t, head], x["b"][0, t, group], x["c"][0, t, group]
            want_state = (step * x["a"][head]).exp() * want_state + step * torch.outer(b, v)
            assert_close(out[0, t, head], c @ want_state + x["d"][head] * v, tolerances.FLOAT64)
        assert_close(state[0, head], want_state, tolerances.FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend: str) -> None:
    x = make(4, batch=1)
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    call = attend(backend)
    assert torch.autograd.gradcheck(lambda *t: call(**dict(zip(x, t, strict=True))), leaves, atol=tolerances.GRADCHECK)


@pytest.mark.parametrize("chunk", [1, 7, 16, 45])
def test_chunk_size_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(45)
    want = outputs_and_gradients(attend("torch"), x)
    monkeypatch.setattr("farspan.ops.gated_linear.torch.CHUNK", chunk)
    assert_same(outputs_and_gradients(attend("torch"), x), want, tolerances.FLOAT64)


@given(length=st.integers(2, 60), data=st.data())
def test_two_parts_equal_the_whole(length: int, data: st.DataObject) -> None:
    x, cut = make(length), data.draw(st.integers(1, length - 1))

    def in_two_parts(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        along = ("x", "dt", "b", "c")
        first = {name: t[:, :cut] if name in along else t for name, t in tensors.items()}
        second = {name: t[:, cut:] if name in along else t for name, t in tensors.items()}
        head, state = attend("torch")(**first)
        tail, state = attend("torch")(**second | {"initial_state": state})
        return torch.cat((head, tail), dim=1), state

    assert_same(outputs_and_gradients(in_two_parts, x), outputs_and_gradients(attend("torch"), x), tolerances.FLOAT64)


def test_steps_equal_the_whole() -> None:
    x = make(9)
    out, state = attend("torch")(**x)
    along, memory = ("x", "dt", "b", "c"), x["initial_state"]
    for t in range(9):
        token = {name: tensor[:, t : t + 1] if name in along else tensor for name, tensor in x.items()}
        step, memory = state_space_duality(**token | {"initial_state": memory}, output_final_state=True)
        assert_close(step, out[:, t : t + 1], tolerances.FLOAT64)
    assert_close(memory, state, tolerances.FLOAT64)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum))
def test_packed_documents_equal_separate_ones(lengths: list[int]) -> None:
    x, bounds = make(sum(lengths), batch=1, sequences=len(lengths)), boundaries(lengths)
    packed, states = attend("torch", cu_seqlens=bounds)(**x)
    for i, (start, end) in enumerate(varlen.spans(bounds)):
        document = {name: t[:, start:end] if t.dim() > 2 and name != "initial_state" else t for name, t in x.items()}
        out, state = attend("reference")(**document | {"initial_state": x["initial_state"][i : i + 1]})
        assert_close(packed[:, start:end], out, tolerances.FLOAT64)
        assert_close(states[i : i + 1], state, tolerances.FLOAT64)


def test_future_does_not_change_past() -> None:
    x = make(40)
    out, _ = attend("torch")(**x)
    for name in ("x", "dt", "b", "c"):
        changed = x[name].clone()
        changed[:, 25:] = 3.0
        other, _ = attend("torch")(**x | {name: changed})
        assert_close(other[:, :25], out[:, :25], tolerances.FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [-1e3, -float("inf")])
def test_fast_decay_leaves_only_the_token_itself(backend: str, rate: float) -> None:
    x = make(40)
    x["a"] = torch.full((4,), rate, dtype=torch.float64)
    x["dt"] = x["dt"].abs()
    x["dt_bias"] = torch.zeros_like(x["dt_bias"])
    out, _ = attend(backend)(**x)
    scores = (x["b"] * x["c"]).sum(-1).repeat_interleave(2, dim=-1)
    want = (steps(x) * scores + x["d"]).unsqueeze(-1) * x["x"]
    assert_close(out, want, tolerances.FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rate_zero_is_linear_attention_weighted_by_the_step(backend: str) -> None:
    x = make(40) | {"d": None, "initial_state": None, "a": torch.zeros(4, dtype=torch.float64)}
    out, _ = attend(backend)(**x)
    b, c = (x[name].repeat_interleave(2, dim=2) for name in ("b", "c"))
    scores = torch.einsum("bthk,bshk->bhts", c, b).tril()
    assert_close(out, torch.einsum("bhts,bshv->bthv", scores, steps(x).unsqueeze(-1) * x["x"]), tolerances.FLOAT64)


def test_a_hundred_thousand_steps_stay_bounded() -> None:
    length = 100_000
    generator = torch.Generator().manual_seed(1)
    x, dt, b, c = (torch.randn(1, length, 1, n, generator=generator) for n in (2, 1, 2, 2))
    out, state = state_space_duality(x, dt[..., 0], torch.tensor([-0.01]), b, c, output_final_state=True)
    step = F.softplus(dt[..., 0])
    bound = step.max() * x.abs().max() * b.abs().max() / -torch.expm1(-0.01 * step.min())
    assert out.isfinite().all()
    assert (state.abs() <= bound).all()


@given(offset=st.integers(0, 5000))
def test_rotating_b_and_c_by_one_offset_changes_nothing(offset: int) -> None:
    x = make(30)
    frequencies = torch.tensor([1.0])

    def rotated(shift: int) -> Tensor:
        table = rotary_table(torch.arange(30).expand(2, -1) + shift, frequencies)
        turned = {name: apply_rotary(x[name], *table).double() for name in ("b", "c")}
        return attend("torch")(**x | turned | {"initial_state": None})[0]

    # Angles of thousands of radians are rounded to float32 before the sine is taken.
    assert_close(rotated(offset), rotated(0), 10 * tolerances.FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_shared_keys(backend: str) -> None:
    x = make(12)
    out, state = attend(backend)(**x)
    repeated = {name: x[name].repeat_interleave(2, dim=2) for name in ("b", "c")}
    want, want_state = attend(backend)(**x | repeated)
    assert_close(out, want, tolerances.FLOAT64)
    assert_close(state, want_state, tolerances.FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_steps_stay_finite(backend: str, dtype: torch.dtype) -> None:
    x = cast(make(70), dtype)
    x["initial_state"] = x["initial_state"].float()
    x["dt"] = torch.tensor([-1e3, -50.0, 0.0, 50.0, 1e3])[torch.randint(5, x["dt"].shape)].to(dtype)
    x["a"] = torch.tensor([-1e-4, -1.0, -16.0, -1e3])
    for name, tensor in outputs_and_gradients(attend(backend), x).items():
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_positive_rate_grows_as_the_formula_says(backend: str) -> None:
    x = make(64) | {"a": torch.ones(4, dtype=torch.float64), "dt": torch.zeros(2, 64, 4, dtype=torch.float64)}
    x["dt_bias"] = torch.zeros(4, dtype=torch.float64)
    _, state = attend(backend)(**x | {"x": torch.zeros_like(x["x"])})
    assert_close(state, 2.0**64 * x["initial_state"], tolerances.FLOAT64)


def test_state_is_float32_for_sixteen_bit_inputs() -> None:
    x = make(40)
    want, _ = attend("reference")(**x)
    out, state = attend("torch")(**cast(x, torch.bfloat16) | {"a": x["a"].float(), "dt_bias": x["dt_bias"].float()})
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(out.double(), want, 2 * tolerances.BFLOAT16)


def test_empty_sequences_are_legal() -> None:
    x = make(0)
    out, state = attend("torch")(**x)
    assert out.shape == (2, 0, 4, 5)
    assert torch.equal(state, x["initial_state"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"b": torch.zeros(2, 3, 3, 3), "c": torch.zeros(2, 3, 3, 3)}, ShapeError, r"G=3 .* H=4 heads"),
        ({"c": torch.zeros(2, 3, 2, 4)}, ShapeError, r"c has shape .* K=3 \(from b\)"),
        ({"a": torch.zeros(2)}, ShapeError, r"a has shape \[2\]; expected \[H\] with H=4 \(from x\)"),
        ({"dt": torch.zeros(2, 4, 4)}, ShapeError, r"dt has shape"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, ShapeError, r"initial_state has shape"),
        ({"dt_limit": (1.0, 0.5)}, ConfigError, r"dt_limit=\(1.0, 0.5\)"),
        ({"dt_limit": (-1.0, 0.5)}, ConfigError, "dt_limit"),
        ({"backend": "cuda"}, ConfigError, "backend='cuda'"),
    ],
)
def test_errors_say_what_is_wrong(changes: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        state_space_duality(**cast(make(3), torch.float32) | changes)
