"""The kernels of experts on a GPU: the PyTorch form's choice, and the same bits every time, busy experts included."""

import pytest
import torch

from farspan.ops import product_key_topk, retrieved_experts
from tests import tolerances
from tests.ops.checks import Named, assert_same, cast, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("keys", "k"), [(128, 64), (1000, 64), (100, 16), (7, 40), (300, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_topk_is_the_torch_form_s(dtype: torch.dtype, keys: int, k: int, tied: bool) -> None:
    """The same choice; the PyTorch form adds its gradient up in the dtype of the scores, so float64 judges both."""
    scores = torch.randn(2, 200, 2, keys, device="cuda")
    scores = (scores.round() if tied else scores).to(dtype)
    weights = torch.randn(200, 2, k, device="cuda").to(dtype)
    best, ids, gradients = [], [], []
    for backend in ("triton", "torch"):
        leaves = [s.clone().requires_grad_() for s in scores]
        found = product_key_topk(*leaves, k, backend=backend)
        best.append(found[0])
        ids.append(found[1])
        gradients.append(torch.autograd.grad(found[0], leaves, weights))
    assert torch.equal(*ids) and torch.equal(*best)
    for ours, theirs, chosen in zip(*gradients, (ids[0] // keys, ids[0] % keys), strict=True):
        exact = torch.zeros_like(ours, dtype=torch.float64).scatter_add(-1, chosen, weights.double())
        error, same_dtype = ((t.double() - exact).abs().max() / exact.abs().max() for t in (ours, theirs))
        assert error <= 2 * same_dtype + 1e-5, f"{error:.3g} of the largest entry, PyTorch {same_dtype:.3g}"


def experts(x: Named, ids: torch.Tensor, backend: str) -> Named:
    return outputs_and_gradients(
        lambda **t: (retrieved_experts(expert_ids=ids, backend=backend, **t).cpu(), torch.zeros(())), x
    )


@pytest.mark.parametrize("busy", [0.0, 0.5, 1.0])
def test_two_hundred_launches_give_the_same_bits(busy: float) -> None:
    """A share of all slots goes to one expert, whose sums are made of pieces."""
    x = {name: torch.randn(shape, device="cuda") for name, shape in {"x": (500, 384), "weights": (500, 16)}.items()}
    x |= {name: torch.randn(1024, 384, device="cuda") * 384**-0.5 for name in ("down", "up")}
    x = cast(x, torch.bfloat16)
    ids = torch.randint(1024, (500, 16), device="cuda")
    ids = torch.where(torch.rand(ids.shape, device="cuda") < busy, 7, ids)
    first = experts(x, ids, "triton")
    assert_same(first, experts(cast(x, torch.float64), ids, "torch"), 2 * tolerances.BFLOAT16)
    other = torch.randn(1024, 1024, device="cuda")
    for _ in range(200):
        torch.mm(other, other)
        again = experts(x, ids, "triton")
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_tokens_and_tables_of_two_dtypes() -> None:
    """Tokens in bfloat16 and tables in float32, as under autocast: no less exact than PyTorch, which widens tokens."""
    x = {name: torch.randn(shape, device="cuda") for name, shape in {"x": (300, 1024), "weights": (300, 64)}.items()}
    x |= {name: torch.randn(512, 1024, device="cuda") * 1024**-0.5 for name in ("down", "up")}
    x["x"] = x["x"].bfloat16()
    ids = torch.randint(512, (300, 64), device="cuda")
    ours, theirs = (experts(x, ids, backend) for backend in ("triton", "torch"))
    exact = experts(cast(x, torch.float64), ids, "torch")
    for name, want in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        error, same_dtype = ((t[name].double() - want).abs().max() for t in (ours, theirs))
        assert error <= 2 * same_dtype + 1e-5 * want.abs().max(), f"{name}: {error:.3g}, PyTorch {same_dtype:.3g}"
