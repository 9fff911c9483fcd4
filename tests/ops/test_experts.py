"""Product keys and retrieved experts: definition, forms, ties, gradients of every order, memory."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.errors import ConfigError, ShapeError
from farspan.ops import product_key_topk, retrieved_experts
from farspan.ops.activations import ACTIVATIONS
from farspan.ops.experts import torch as fast_form
from farspan.ops.experts.api import too_wide
from tests import tolerances
from tests.ops.checks import assert_close

BACKENDS = ["reference", "torch"]
Tensors = dict[str, Tensor]


def make(tokens: int, slots: int, experts: int, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(tokens)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    tensors = {"x": randn(tokens, width), "weights": randn(tokens, slots)}
    tensors |= {"down": randn(experts, width), "up": randn(experts, width)}
    ids = torch.randint(experts, (tokens, slots), generator=generator)
    return {name: x.to(dtype) for name, x in tensors.items()} | {"expert_ids": ids}


def with_gradients(backend: str, tensors: Tensors, activation: str = "silu") -> Tensors:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if name != "expert_ids"}
    out = retrieved_experts(**leaves, expert_ids=tensors["expert_ids"], activation=activation, backend=backend)
    (out.double() * torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    assert out.dtype == tensors["x"].dtype
    return {"out": out.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


def scores(tokens: int, heads: int, keys: int, tied: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, tokens, heads, keys, dtype=torch.float64)
    return tuple((x.round() if tied else x).unbind(0))


@pytest.mark.parametrize("backend", BACKENDS)
@given(keys=st.integers(1, 9), heads=st.integers(1, 3), tied=st.booleans(), data=st.data())
def test_topk_is_brute_force_over_all_pairs(backend: str, keys: int, heads: int, tied: bool, data: Any) -> None:
    k = data.draw(st.integers(1, keys * keys))
    x, y = scores(3, heads, keys, tied)
    best, ids = product_key_topk(x, y, k, backend=backend)
    for token in range(3):
        for head in range(heads):
            row_x, row_y = x[token, head].tolist(), y[token, head].tolist()
            pairs = [(row_x[i] + row_y[j], row_x[i], row_y[j], -i, -j) for i in range(keys) for j in range(keys)]
            pairs = sorted(pairs, reverse=True)[:k]
            assert ids[token, head].tolist() == [-i * keys - j for *_, i, j in pairs]
            assert best[token, head].tolist() == [pair[0] for pair in pairs]


@given(keys=st.integers(1, 40), k=st.integers(1, 64), tied=st.booleans())
def test_torch_topk_equals_reference(keys: int, k: int, tied: bool) -> None:
    k = min(k, keys * keys)
    results = {}
    for backend in BACKENDS:
        torch.manual_seed(keys)
        leaves = [t.requires_grad_() for t in scores(4, 2, keys, tied)]
        best, ids = product_key_topk(*leaves, k, backend=backend)
        results[backend] = (best, ids, *torch.autograd.grad((best * torch.arange(k)).sum(), leaves))
    for got, want in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_topk_gradients_equal_finite_differences() -> None:
    leaves = [t.requires_grad_() for t in scores(2, 2, 4)]
    for backend in BACKENDS:
        call = lambda x, y, backend=backend: product_key_topk(x, y, 5, backend=backend)[0]  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves, atol=tolerances.GRADCHECK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_experts_are_the_formula(backend: str, activation: str) -> None:
    t = make(4, 3, 6)
    out = retrieved_experts(**t, activation=activation, backend=backend)
    for n in range(4):
        want = torch.zeros(5, dtype=torch.float64)
        for r in range(3):
            expert = t["expert_ids"][n, r]
            want += t["weights"][n, r] * ACTIVATIONS[activation](t["x"][n] @ t["down"][expert]) * t["up"][expert]
        assert_close(out[n], want, tolerances.FLOAT64)


@given(tokens=st.integers(1, 20), slots=st.integers(1, 9), experts=st.integers(1, 30))
def test_torch_experts_equal_reference(tokens: int, slots: int, experts: int) -> None:
    t = make(tokens, slots, experts)
    want = with_gradients("reference", t)
    for dtype, tolerance in ((torch.float64, tolerances.FLOAT64), (torch.float32, tolerances.FLOAT32)):
        got = with_gradients("torch", {name: x.to(dtype) if x.is_floating_point() else x for name, x in t.items()})
        for name in want:
            assert_close(got[name], want[name], tolerance, name)


def test_sixteen_bit_experts_are_as_precise_as_the_reference_in_sixteen_bits() -> None:
    t = make(32, 16, 64, width=48, dtype=torch.bfloat16)
    exact = with_gradients("reference", {n: x.double() if x.is_floating_point() else x for n, x in t.items()})
    ours, plain = with_gradients("torch", t), with_gradients("reference", t)
    for name, want in exact.items():
        errors = [((x[name].double() - want).norm() / want.norm()).item() for x in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-5, f"{name}: {errors}"


def test_float32_tables_serve_sixteen_bit_tokens() -> None:
    """As under autocast: parameters and their gradients stay float32."""
    t = make(8, 4, 16)
    mixed = {name: x.to(torch.bfloat16 if name == "x" else torch.float32) for name, x in t.items()}
    mixed["expert_ids"] = t["expert_ids"]
    got, want = with_gradients("torch", mixed), with_gradients("reference", mixed)
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert_close(got[name], want[name], tolerances.BFLOAT16, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_gradients_equal_finite_differences(backend: str) -> None:
    t = make(3, 4, 5, width=3)
    ids = t.pop("expert_ids")
    leaves = [x.requires_grad_() for x in t.values()]

    def call(*tensors: Tensor) -> Tensor:
        return retrieved_experts(**dict(zip(t, tensors, strict=True)), expert_ids=ids, backend=backend)

    assert torch.autograd.gradcheck(call, leaves, atol=tolerances.GRADCHECK)
    assert torch.autograd.gradgradcheck(call, leaves, atol=tolerances.GRADCHECK)


def test_stretches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    t = make(23, 4, 9)
    want = with_gradients("torch", t)
    monkeypatch.setattr(fast_form, "STRETCH", {False: 3 * 4 * 5, True: 0})
    for name, got in with_gradients("torch", t).items():
        assert torch.equal(got, want[name]), name


def test_order_of_experts_has_no_effect() -> None:
    t = make(12, 4, 9)
    order = torch.randperm(9)
    moved = t | {name: t[name][order] for name in ("down", "up")} | {"expert_ids": order.argsort()[t["expert_ids"]]}
    torch.testing.assert_close(retrieved_experts(**moved), retrieved_experts(**t), atol=1e-12, rtol=0)


def test_gradients_are_the_same_bits_every_time() -> None:
    t = make(64, 16, 20, dtype=torch.float32)
    first, second = with_gradients("torch", t), with_gradients("torch", t)
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


def test_no_tensor_per_slot_and_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, slots, experts, width = 256, 16, 64, 32
    t = make(tokens, slots, experts, width, torch.float32)
    monkeypatch.setattr(fast_form, "STRETCH", {False: 1 << 12, True: 0})
    with _Largest() as largest:
        with_gradients("torch", t)
    assert largest.numel <= max(tokens * width, 1 << 12)
    with _Largest() as largest:
        with_gradients("reference", t)
    assert largest.numel == tokens * slots * width


@given(keys=st.integers(1, 40), k=st.integers(1, 80))
def test_candidates_are_the_pairs_with_less_than_k_before_them(keys: int, k: int) -> None:
    pairs = [[i, j] for i in range(keys) for j in range(keys) if (i + 1) * (j + 1) <= k]
    assert fast_form.candidate_ranks(k, keys, torch.device("cpu")).mT.tolist() == pairs


def test_kernels_say_what_they_do_not_serve() -> None:
    assert "at most D=4096 numbers of 4 bytes, not 5000" in str(too_wide([torch.empty(1, 5000)]))
    assert "float32" in str(too_wide([torch.empty(1, 5, dtype=torch.float64)]))
    assert too_wide([torch.empty(1, 8192, dtype=torch.bfloat16)]) is None


def test_candidates_are_few() -> None:
    """Of 16384 sums only those with i · j ≤ 64 are formed for the best 64."""
    x, y = scores(1, 1, 128)
    with _Largest() as largest:
        product_key_topk(x, y, 64, backend="torch")
    assert largest.numel <= 2 * 280


def test_no_tokens() -> None:
    t = make(0, 3, 6)
    for backend in BACKENDS:
        results = with_gradients(backend, t)
        assert results["out"].shape == (0, 5)
        assert not results["d_down"].any()
        best, ids = product_key_topk(*scores(0, 2, 4), 3, backend=backend)
        assert best.shape == ids.shape == (0, 2, 3)


def test_mistakes_have_one_clear_message() -> None:
    t = make(3, 2, 4)
    for change, words in (
        ({"weights": t["weights"][:2]}, r"weights has shape \[2, 2\]; expected \[N, R\] with N=3 \(from x\)"),
        ({"up": t["up"][:, :4]}, r"up has shape \[4, 4\]; expected \[E, D\]"),
        ({"expert_ids": t["expert_ids"].int()}, r"expert_ids is torch.int32 .* expected int64 \[N, R\]=\[3, 2\]"),
        ({"expert_ids": t["expert_ids"][:, :1]}, r"expert_ids is torch.int64 \[3, 1\]"),
    ):
        with pytest.raises(ShapeError, match=words):
            retrieved_experts(**t | change)
    with pytest.raises(ConfigError, match="activation='swish' is not known"):
        retrieved_experts(**t, activation="swish")
    x, y = scores(2, 1, 3)
    for k in (0, 10):
        with pytest.raises(ConfigError, match=f"k={k} must lie between 1 and P²=9"):
            product_key_topk(x, y, k)
    with pytest.raises(ShapeError, match="scores_y has shape"):
        product_key_topk(x, y[..., :2], 1)
    with pytest.raises(ShapeError, match=r"scores_x is torch.float16, scores_y is torch.float\d\d; give both in one"):
        product_key_topk(x.half(), y, 1)
