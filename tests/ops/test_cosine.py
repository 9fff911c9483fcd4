"""Cosine attention: its forms agree, counts are what the formula says, and the properties of a sum of cosines hold."""

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from farspan.errors import BackendUnavailable, ConfigError, ShapeError
from farspan.ops import cosine_attention, gated_linear_attention, varlen
from tests import tolerances
from tests.ops.checks import Named, assert_close, assert_same, boundaries, cast, outputs_and_gradients

BACKENDS = ["reference", "torch"]
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=4)


def make(length: int, *, batch: int = 2, sequences: int | None = None, state: bool = True) -> Named:
    """Random inputs in float64 with two heads, K = 5 and V = 7."""
    generator = torch.Generator().manual_seed(length)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    tensors: Named = {
        "q": 3 * randn(batch, length, 2, 5),
        "k": randn(batch, length, 2, 5) / 3,
        "v": randn(batch, length, 2, 7),
        "exponent": randn(2),
    }
    if state:
        tensors["initial_state"] = randn(batch if sequences is None else sequences, 2, 5, 7)
    return tensors


def attend(backend: str, *, past: int | list[int] = 3, sequences: int = 2, **options: Any) -> partial:
    """The causal call with its state, behind `past` tokens."""
    count = torch.tensor(past).expand(sequences)
    return partial(cosine_attention, output_final_state=True, initial_count=count, backend=backend, **options)


def both_sides(backend: str, **options: Any) -> Any:
    """The bidirectional call; its missing state is replaced by a constant."""

    def call(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = cosine_attention(**tensors, causal=False, backend=backend, **options)
        return out, out.new_zeros(1)

    return call


def formula(x: Named, *, causal: bool, norm_position: str = "value") -> Tensor:
    """The sums of the docstring for the first row, without a past."""
    q, k = (x[name][0] / x[name][0].norm(dim=-1, keepdim=True) for name in ("q", "k"))
    v, power = x["v"][0], torch.sigmoid(x["exponent"])
    rows, length = [], len(v)
    for t in range(length):
        row = torch.zeros_like(v[0])
        for s in range(t + 1 if causal else length):
            count = (s if norm_position == "value" else t) + 1 if causal else length
            row = row + ((q[t] * k[s]).sum(-1) / count**power).unsqueeze(-1) * v[s]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm_position", ["value", "query"])
def test_every_form_is_the_formula(backend: str, causal: bool, norm_position: str) -> None:
    for length in (3, 6):  # below and above the length at which the order of the products changes
        x = make(length, batch=1, state=False)
        out, _ = cosine_attention(**x, causal=causal, norm_position=norm_position, backend=backend)
        assert_close(out[0], formula(x, causal=causal, norm_position=norm_position), tolerances.FLOAT64)


@pytest.mark.parametrize("norm_position", ["value", "query"])
@pytest.mark.parametrize("length", [1, 5, 32, 77])
def test_chunked_matches_reference(length: int, norm_position: str) -> None:
    x = make(length)
    want = outputs_and_gradients(attend("reference", norm_position=norm_position), x)
    got = outputs_and_gradients(attend("torch", norm_position=norm_position), x)
    assert_same(got, want, tolerances.FLOAT64)
    single = outputs_and_gradients(attend("torch", norm_position=norm_position), cast(x, torch.float32))
    assert_same(single, want, tolerances.FLOAT32)


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunk_length_does_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(77)
    want = outputs_and_gradients(attend("torch"), x)
    monkeypatch.setattr(importlib.import_module("farspan.ops.gated_linear.torch"), "CHUNK", chunk)
    assert_same(outputs_and_gradients(attend("torch"), x), want, tolerances.FLOAT64)


@pytest.mark.parametrize("length", [1, 3, 6, 70])
def test_matrix_and_quadratic_order_are_one_function(length: int) -> None:
    x = make(length, state=False)
    want = outputs_and_gradients(both_sides("reference"), x)
    assert_same(outputs_and_gradients(both_sides("torch"), x), want, tolerances.FLOAT64)
    assert_same(outputs_and_gradients(both_sides("torch"), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend: str) -> None:
    for causal in (True, False):
        x = make(4, batch=1, state=causal)
        options = {"initial_count": torch.tensor([2]), "output_final_state": True} if causal else {"causal": False}
        call = partial(cosine_attention, backend=backend, **options)
        leaves = [tensor.requires_grad_() for tensor in x.values()]
        assert torch.autograd.gradcheck(
            lambda *t, call=call, x=x: [y for y in call(**dict(zip(x, t, strict=True))) if y is not None],
            leaves,
            atol=tolerances.GRADCHECK,
        )


def test_gradients_are_the_published_sums() -> None:
    """dq_t = W_tᵀ g_t, dk_t = R_tᵀ v_t, dv_t = R_t k_t with W = Σ_{j≤t} v_j k_jᵀ and R = Σ_{i≥t} g_i q_iᵀ."""
    x = make(9, batch=1, state=False)
    q, k = (F.normalize(x[name], dim=-1).requires_grad_() for name in ("q", "k"))
    v, g = x["v"].requires_grad_(), torch.randn_like(x["v"])
    out, _ = gated_linear_attention(q, k, v, scale=1.0)
    out.backward(g)
    written = torch.einsum("bthv,bthk->bthvk", v, k).cumsum(1)
    read = torch.einsum("bthv,bthk->bthvk", g, q).flip(1).cumsum(1).flip(1)
    assert_close(q.grad, torch.einsum("bthvk,bthv->bthk", written, g), tolerances.FLOAT64)
    assert_close(k.grad, torch.einsum("bthvk,bthv->bthk", read, v), tolerances.FLOAT64)
    assert_close(v.grad, torch.einsum("bthvk,bthk->bthv", read, k), tolerances.FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_future_does_not_change_past(backend: str) -> None:
    x = make(50)
    out, _ = attend(backend)(**x)
    changed = {name: tensor.clone() for name, tensor in x.items()}
    for name in ("q", "k", "v"):
        changed[name][:, 30:] = 1.0
    assert torch.equal(attend(backend)(**changed)[0][:, :30], out[:, :30])


@pytest.mark.parametrize("norm_position", ["value", "query"])
@given(length=st.integers(1, 40), data=st.data())
def test_any_split_with_the_state_carried_is_the_whole(norm_position: str, length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, length))
    x = make(length)
    want, want_state = attend("torch", norm_position=norm_position)(**x)
    first, second = ({n: x[n][:, part] for n in ("q", "k", "v")} for part in (slice(cut), slice(cut, None)))
    shared = {"exponent": x["exponent"]}
    head, state = attend("torch", norm_position=norm_position)(**first, **shared, initial_state=x["initial_state"])
    behind = attend("torch", past=3 + cut, norm_position=norm_position)
    tail, state = behind(**second, **shared, initial_state=state)
    assert_close(torch.cat([head, tail], dim=1), want, tolerances.FLOAT64)
    assert_close(state, want_state, tolerances.FLOAT64)


def test_steps_equal_the_whole() -> None:
    x = make(12, state=False)
    want, want_state = cosine_attention(**x, output_final_state=True)
    state = None
    for t in range(12):
        token = {name: x[name][:, t : t + 1] for name in ("q", "k", "v")}
        count = torch.full((2,), t)
        out, state = cosine_attention(
            **token, exponent=x["exponent"], initial_state=state, initial_count=count, output_final_state=True
        )
        assert_close(out[:, 0], want[:, t], tolerances.FLOAT64)
    assert_close(state, want_state, tolerances.FLOAT64)


def test_two_halves_hand_over_state_and_count_as_a_plain_sum() -> None:
    """Without decay a rank needs only the sum of the states before it, and the number of tokens."""
    x = make(30, state=False)
    want, want_state = cosine_attention(**x, output_final_state=True)
    halves = [{n: x[n][:, part] for n in ("q", "k", "v")} for part in (slice(17), slice(17, None))]
    counts = [torch.full((2,), 0), torch.full((2,), 17)]
    runs = [
        cosine_attention(**half, exponent=x["exponent"], initial_count=count, output_final_state=True)
        for half, count in zip(halves, counts, strict=True)
    ]
    second = runs[1][0] + F.normalize(halves[1]["q"], dim=-1).transpose(1, 2).matmul(runs[0][1]).transpose(1, 2)
    assert_close(torch.cat([runs[0][0], second], dim=1), want, tolerances.FLOAT64)
    assert_close(runs[0][1] + runs[1][1], want_state, tolerances.FLOAT64)


@pytest.mark.parametrize("causal", [True, False])
@given(stretch=st.floats(1e-3, 1e3))
def test_lengths_of_queries_and_keys_do_not_matter(causal: bool, stretch: float) -> None:
    x = make(10, state=False)
    out, _ = cosine_attention(**x, causal=causal)
    for name in ("q", "k"):
        stretched, _ = cosine_attention(**x | {name: stretch * x[name]}, causal=causal)
        assert_close(stretched, out, tolerances.FLOAT64)
    doubled, _ = cosine_attention(**x | {"v": stretch * x["v"]}, causal=causal)
    assert_close(doubled, stretch * out, tolerances.FLOAT64)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_queries_and_keys_are_orthogonal_to_them(causal: bool) -> None:
    x = make(10, state=False)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    cosine_attention(**leaves, causal=causal)[0].square().sum().backward()
    for name in ("q", "k"):
        along = torch.linalg.vecdot(leaves[name].grad, leaves[name])
        assert along.abs().max() < 1e-12 * leaves[name].grad.abs().max() * leaves[name].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@given(seed=st.integers(0, 1000))
def test_padding_anywhere_has_no_effect(backend: str, causal: bool, seed: int) -> None:
    x = make(24, state=False)
    keep = torch.rand(2, 24, generator=torch.Generator().manual_seed(seed)) < 0.6
    out, state = cosine_attention(**x, causal=causal, padding_mask=keep, output_final_state=causal, backend=backend)
    assert (out[~keep] == 0).all()
    for row in range(2):
        dense = {name: x[name][row : row + 1, keep[row]] for name in ("q", "k", "v")}
        want, want_state = cosine_attention(
            **dense, exponent=x["exponent"], causal=causal, output_final_state=causal, backend=backend
        )
        assert_close(out[row : row + 1, keep[row]], want, tolerances.FLOAT64)
        if causal:
            assert_close(state[row : row + 1], want_state, tolerances.FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_of_padding_alone_is_finite(backend: str, causal: bool) -> None:
    x = cast(make(6, state=False), torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    mask = torch.tensor([[0] * 6, [1] * 6])
    out, _ = cosine_attention(**leaves, causal=causal, padding_mask=mask, backend=backend)
    out.square().sum().backward()
    assert (out[0] == 0).all()
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all(), name
    assert (leaves["k"].grad[0] == 0).all() and (leaves["v"].grad[0] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_ones_of_any_dtype_are_no_mask(causal: bool) -> None:
    x = make(8, state=False)
    out, _ = cosine_attention(**x, causal=causal)
    for dtype in (torch.bool, torch.long, torch.int32):
        masked, _ = cosine_attention(**x, causal=causal, padding_mask=torch.ones(2, 8, dtype=dtype))
        assert torch.equal(masked, out)
    with pytest.raises(ShapeError, match="boolean or integer mask"):  # an additive mask would read inverted
        cosine_attention(**x, padding_mask=torch.zeros(2, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [-2.0, 0.5, 30.0])
def test_equal_vectors_count_the_tokens(backend: str, logit: float) -> None:
    ones, exponent = torch.ones(1, 20, 1, 4, dtype=torch.float64), torch.tensor([logit], dtype=torch.float64)
    power, places = torch.sigmoid(exponent).item(), torch.arange(1, 21, dtype=torch.float64)
    call = partial(cosine_attention, ones, ones, ones[..., :1], exponent, backend=backend)
    assert_close(call()[0].flatten(), (places**-power).cumsum(0), tolerances.FLOAT64)
    assert_close(call(norm_position="query")[0].flatten(), places ** (1 - power), tolerances.FLOAT64)
    assert_close(call(causal=False)[0].flatten(), torch.full_like(places, 20 ** (1 - power)), tolerances.FLOAT64)


def test_limits_of_the_exponent_are_the_mean_and_the_sum() -> None:
    x = make(12, state=False)
    q, k = (F.normalize(x[name], dim=-1) for name in ("q", "k"))
    total = torch.einsum("bthk,bshk,bshv->bthv", q, k, x["v"])
    mean, _ = cosine_attention(**x | {"exponent": torch.full((2,), 60.0, dtype=torch.float64)}, causal=False)
    plain, _ = cosine_attention(**x | {"exponent": torch.full((2,), -60.0, dtype=torch.float64)}, causal=False)
    without, _ = cosine_attention(**x | {"exponent": None}, causal=False)
    assert_close(mean, total / 12, tolerances.FLOAT64)
    assert_close(plain, total, tolerances.FLOAT64)
    assert_close(without, total, tolerances.FLOAT64)


@given(length=st.integers(1, 40))
def test_outputs_stay_within_the_weighted_values(length: int) -> None:
    x = make(length, state=False)
    out, _ = cosine_attention(**x)
    weights = torch.arange(1, length + 1).reshape(1, -1, 1) ** -torch.sigmoid(x["exponent"])
    bound = (weights * x["v"].norm(dim=-1)).cumsum(1)
    assert (out.norm(dim=-1) <= bound * (1 + 1e-12)).all()


def test_bidirectional_does_not_know_the_order() -> None:
    x, order = make(15, state=False), torch.randperm(15)
    out, _ = cosine_attention(**x, causal=False)
    moved = {name: tensor if name == "exponent" else tensor[:, order] for name, tensor in x.items()}
    assert_close(cosine_attention(**moved, causal=False)[0], out[:, order], tolerances.FLOAT64)


def test_one_token_gives_no_gradient_to_the_exponent() -> None:
    for causal in (True, False):
        x = make(1, state=False)
        leaf = x["exponent"].requires_grad_()
        out, _ = cosine_attention(**x, causal=causal)
        out.sum().backward()
        assert (leaf.grad == 0).all()
        free = F.normalize(x["q"], dim=-1) @ F.normalize(x["k"], dim=-1).mT
        assert_close(out, torch.diagonal(free, dim1=-2, dim2=-1).unsqueeze(-1) * x["v"], tolerances.FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@given(lengths=LENGTHS)
def test_packed_documents_equal_separate_ones(backend: str, causal: bool, lengths: list[int]) -> None:
    x = make(sum(lengths), batch=1, sequences=len(lengths), state=causal)
    bounds, past = boundaries(lengths), [5 * i for i in range(len(lengths))]
    options = {"initial_count": torch.tensor(past), "output_final_state": True} if causal else {"causal": False}
    out, state = cosine_attention(**x, cu_seqlens=bounds, backend=backend, **options)
    for i, (start, end) in enumerate(varlen.spans(bounds)):
        alone: dict[str, Any] = {name: x[name][:, start:end] for name in ("q", "k", "v")}
        alone |= {"exponent": x["exponent"], "backend": backend, **options}
        if causal:
            alone |= {"initial_state": x["initial_state"][i : i + 1], "initial_count": torch.tensor(past[i : i + 1])}
        want, want_state = cosine_attention(**alone)
        assert_close(out[:, start:end], want, tolerances.FLOAT64)
        if causal:
            assert_close(state[i : i + 1], want_state, tolerances.FLOAT64)


@pytest.mark.parametrize("causal", [True, False])
def test_packing_and_padding_together(causal: bool) -> None:
    x, keep = make(11, batch=1, state=False), torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1]])
    out, _ = cosine_attention(**x, causal=causal, padding_mask=keep, cu_seqlens=boundaries([5, 6]))
    dense = {name: x[name][:, keep[0].bool()] for name in ("q", "k", "v")}
    want, _ = cosine_attention(**dense, exponent=x["exponent"], causal=causal, cu_seqlens=boundaries([3, 4]))
    assert_close(out[:, keep[0].bool()], want, tolerances.FLOAT64)


def test_the_norm_has_a_floor_not_an_added_term() -> None:
    x = make(3, batch=1, state=False)
    x["q"] = torch.zeros_like(x["q"])
    x["q"][..., 0] = 1e-13
    for backend in BACKENDS:
        small, _ = cosine_attention(**x, backend=backend)
        want, _ = cosine_attention(**x | {"q": 1e13 * x["q"]}, backend=backend)
        assert_close(small, 0.1 * want, tolerances.FLOAT64)
        zero, _ = cosine_attention(**x | {"q": torch.zeros_like(x["q"])}, backend=backend)
        assert (zero == 0).all()


def test_error_of_16_bit_inputs_does_not_grow_with_the_length() -> None:
    """The state is float32: one in bfloat16 would lose accuracy with every token that it takes up."""
    q, k, v = torch.randn(3, 1, 8192, 1, 32).bfloat16().unbind(0)
    exponent = torch.tensor([0.5])
    exact, _ = cosine_attention(q.double(), k.double(), v.double(), exponent)
    out, state = cosine_attention(q, k, v, exponent, output_final_state=True)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    error = (out.double() - exact).square().mean((0, 2, 3)).sqrt() / exact.square().mean((0, 2, 3)).sqrt()
    assert error[-512:].mean() < 2 * error[:512].mean() < 2 * tolerances.BFLOAT16


def test_memory_for_the_backward_pass_is_linear_in_the_length() -> None:
    def saved(length: int) -> int:
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = [torch.randn(1, length, 1, 16, requires_grad=True) for _ in range(3)]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out, _ = cosine_attention(*leaves, torch.zeros(1, requires_grad=True))
        assert out.requires_grad
        return sum(sizes.values())

    small, middle, large = (saved(length) for length in (512, 1024, 2048))
    assert middle < 2.1 * small and large < 2.1 * middle


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": ({"exponent": torch.zeros(3)}, ShapeError, r"exponent has shape \[3\]; expected \[H\] with H=2"),
    "norm_position": ({"norm_position": "key"}, ConfigError, "norm_position='key' is not known"),
    "backend": ({"backend": "cuda"}, ConfigError, "backend='cuda'"),
    "kernels": ({"backend": "triton"}, BackendUnavailable, "use backend='torch'"),
    "count": ({"initial_count": None}, ConfigError, "initial_state needs initial_count"),
    "count_shape": ({"initial_count": torch.tensor([1])}, ShapeError, r"integer \[num_seqs\] = \[2\]"),
    "count_dtype": ({"initial_count": torch.zeros(2)}, ShapeError, "initial_count is torch.float32"),
    "no_past": ({"causal": False}, ConfigError, "causal=False has no past"),
}


@pytest.mark.parametrize(("options", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_calls_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cosine_attention(**{**make(4), "initial_count": torch.tensor([1, 2]), **options})
