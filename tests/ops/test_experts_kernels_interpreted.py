"""The kernels of experts in Triton's interpreter, against the reference, forward and gradient."""

import pytest
import torch
from torch import Tensor

from farspan.ops import product_key_topk, retrieved_experts
from farspan.ops.activations import ACTIVATIONS
from farspan.ops.experts import routing_triton as routing
from farspan.ops.experts import triton as kernels
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.test_experts import make, scores


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {"DOTS": (2, 4, 1, 1), "MIX": (4, 4, 1, 1), "GRADIENT": (2, 16, 1, 1), "JOIN": (1, 4, 1, 1)}
    for name, value in (tiles | {"STRETCH": 4, "PIECE": 4}).items():
        monkeypatch.setattr(kernels, name, value)


def gradients(call: object, tensors: dict[str, Tensor], activation: str = "gelu") -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if name != "expert_ids"}
    out = call(**leaves, expert_ids=tensors["expert_ids"], activation=activation)  # type: ignore[operator]
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {"out": out.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


def compare(tensors: dict[str, Tensor], activation: str = "gelu") -> None:
    want = gradients(lambda **t: retrieved_experts(**t, backend="reference"), tensors, activation)
    single = {name: x if name == "expert_ids" else x.float() for name, x in tensors.items()}
    got = gradients(kernels.retrieved_experts_triton, single, activation)
    for name in want:
        assert_close(got[name], want[name], tolerances.FLOAT32, name)


@pytest.mark.parametrize(("tokens", "slots", "experts", "width"), [(9, 6, 5, 7), (1, 1, 3, 4), (5, 9, 30, 10)])
def test_kernels_match_the_reference(tokens: int, slots: int, experts: int, width: int) -> None:
    compare(make(tokens, slots, experts, width))


@pytest.mark.parametrize("narrow", [("x",), ("down", "up")])
def test_tokens_and_tables_of_two_dtypes(narrow: tuple[str, ...]) -> None:
    tensors = make(9, 6, 5, 7, torch.float32)
    tensors |= {name: tensors[name].half() for name in narrow}
    want = gradients(lambda **t: retrieved_experts(**t, backend="reference"), tensors)
    got = gradients(kernels.retrieved_experts_triton, tensors)
    for name in want:
        assert got[name].dtype == want[name].dtype
        half = want[name].dtype == torch.float16
        assert_close(got[name], want[name], tolerances.BFLOAT16 if half else tolerances.FLOAT32, name)


def test_what_is_frozen_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    node, sizes = kernels.backward_node, []

    def spy(*arguments: object) -> tuple[Tensor, ...]:
        results = node(*arguments)
        sizes.append(sum(x.numel() for x in results[2:]))
        return results

    monkeypatch.setattr(kernels, "backward_node", spy)
    tensors = make(12, 6, 5, 7, torch.float32)  # an expert has several pieces
    want = gradients(kernels.retrieved_experts_triton, tensors)
    for frozen in (("down", "up"), ("up",), ("x", "down", "up"), ("weights",)):
        leaves = {name: x.clone() for name, x in tensors.items()}
        for name in leaves.keys() - {*frozen, "expert_ids"}:
            leaves[name].requires_grad_()
        out = kernels.retrieved_experts_triton(**leaves, activation="gelu")
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        for name, leaf in leaves.items():
            found = leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, want[f"d_{name}"])
            assert found, (frozen, name)
    assert sizes == [2 * 5 * 7, 0, 2 * 5 * 7, 0, 2 * 5 * 7]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_slopes(activation: str) -> None:
    compare(make(3, 4, 5, 6), activation)


@pytest.mark.parametrize("loads", [[31], [4, 12, 0, 1, 14], [13, 5, 13]])
def test_busy_experts_are_cut_into_pieces(loads: list[int]) -> None:
    ids = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    compare(make(31, 1, len(loads)) | {"expert_ids": ids[torch.randperm(31)].unsqueeze(1)})


def test_experts_nobody_chose_have_no_gradient() -> None:
    tensors = make(4, 3, 9, dtype=torch.float32) | {"expert_ids": torch.full((4, 3), 2)}
    found = gradients(kernels.retrieved_experts_triton, tensors)
    chosen = torch.arange(9) == 2
    assert not found["d_up"][~chosen].any() and found["d_up"][chosen].any()


def test_gradients_of_gradients_are_the_reference_s() -> None:
    found = []
    for call in (kernels.retrieved_experts_triton, lambda **t: retrieved_experts(**t, backend="reference")):
        t = {name: x if name == "expert_ids" else x.float() for name, x in make(4, 3, 5).items()}
        leaves = [x.requires_grad_() for name, x in t.items() if name != "expert_ids"]
        first = torch.autograd.grad(call(**t, activation="silu").square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*found, strict=True):
        assert_close(got, want, tolerances.FLOAT32)


def test_gradients_of_gradients_of_scores_are_the_reference_s() -> None:
    found = []
    for call in (routing.product_key_topk_triton, lambda *t: product_key_topk(*t, backend="reference")):
        torch.manual_seed(0)
        leaves = [t.float().requires_grad_() for t in scores(3, 2, 5)]
        first = torch.autograd.grad((call(*leaves, 7)[0] ** 3).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*found, strict=True):
        assert_close(got, want, tolerances.FLOAT32)


def test_nothing_in_nothing_out() -> None:
    tensors = make(0, 3, 4, dtype=torch.float32)
    found = gradients(kernels.retrieved_experts_triton, tensors)
    assert found["out"].shape == (0, 5) and not found["d_down"].any()
    best, ids = routing.product_key_topk_triton(*(s.float() for s in scores(0, 2, 4)), 3)
    assert best.shape == ids.shape == (0, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("keys", "k", "tied"), [(1, 1, False), (5, 25, True), (6, 7, False), (40, 17, True), (3, 8, True)]
)
def test_topk_is_the_reference_s(dtype: torch.dtype, keys: int, k: int, tied: bool) -> None:
    results = []
    for call in (routing.product_key_topk_triton, lambda *t: product_key_topk(*t, backend="reference")):
        torch.manual_seed(keys)
        leaves = [t.to(dtype).requires_grad_() for t in scores(3, 2, keys, tied)]
        best, ids = call(*leaves, k)
        results.append((best, ids, *torch.autograd.grad((best * torch.arange(k, dtype=dtype)).sum(), leaves)))
    (best, ids, *got), (want_best, want_ids, *want) = results
    assert torch.equal(ids, want_ids)
    if dtype == torch.bfloat16:  # the interpreter cuts what a card rounds
        assert_close(best, want_best, tolerances.BFLOAT16)
    else:
        assert torch.equal(best, want_best)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, tolerances.FLOAT32 if dtype == torch.float32 else tolerances.BFLOAT16)


def test_compiled_call_is_one_graph() -> None:
    def call(scores_x: Tensor, scores_y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        best, ids = routing.product_key_topk_triton(scores_x, scores_y, 3)
        weights = torch.softmax(best, -1).flatten(1)
        return kernels.retrieved_experts_triton(x, ids.flatten(1), weights, down, up, activation="silu")

    inputs = [t.float() for t in (*scores(4, 2, 3), *(make(4, 1, 9)[name] for name in ("x", "down", "up")))]
    found = []
    for form in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = form(*leaves)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(got, want) for got, want in zip(*found, strict=True))
