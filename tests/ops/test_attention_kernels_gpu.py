"""The kernels of the attention-like operators on a GPU: against the formulas in float64, repeated, between others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farspan.ops import collinear_attention, collinear_coefficients, dilated_attention
from tests import tolerances
from tests.ops.checks import Named, assert_same, cast, outputs_and_gradients
from tests.ops.test_collinear import table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
HALVES = [torch.bfloat16, torch.float16]


def results(op: Callable[..., Tensor], x: Named) -> Named:
    """The output and all gradients, on the CPU."""
    found = outputs_and_gradients(lambda **t: (op(**t).cpu(), torch.zeros(())), x)
    return {name: tensor.cpu() for name, tensor in found.items()}


def compare(op: Callable[..., Tensor], x: Named, exact: str = "torch") -> None:
    """The kernels against another form on the same numbers in float64; runs between other launches are equal."""
    want = results(lambda **t: op(backend=exact, **t), cast(x, torch.float64))
    runs = []
    for _ in range(3):
        other = torch.randn(512, 512, device="cuda")
        torch.mm(other, other)
        runs.append(results(lambda **t: op(backend="triton", **t), x))
        assert_same(runs[-1], want, 2 * tolerances.BFLOAT16)
        assert_same(runs[-1], runs[0], tolerances.BFLOAT16 / 2)


def normal(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Named:
    return {name: torch.randn(shape, device="cuda").to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rule", ["mod", "block", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "heads", "groups", "width"), [(1024, 12, 12, 64), (777, 4, 2, 24), (65, 3, 3, 128)])
def test_dilated_matches_torch(
    length: int, heads: int, groups: int, width: int, causal: bool, rule: str, dtype: torch.dtype
) -> None:
    key = (2, length, groups, width)
    x = normal(dtype, q=(2, length, heads, width), k=key, v=key)

    def op(**arguments: object) -> Tensor:
        patterns = {"segment_lengths": [128, 256, 600], "dilations": [1, 4, 12]}
        return dilated_attention(**arguments, **patterns, head_offset=rule, causal=causal)

    compare(op, x)


@pytest.mark.parametrize("detach", [False, True])
def test_dilated_with_rotations_or_detached_matches_torch(detach: bool) -> None:
    x = normal(torch.bfloat16, q=(1, 500, 4, 64), k=(1, 500, 4, 64), v=(1, 500, 4, 64))
    rates = {"frequencies": torch.rand(32, device="cuda"), "growth": torch.rand(32, device="cuda") * 1e-3}

    def op(**arguments: object) -> Tensor:
        patterns = {"segment_lengths": [100, 400], "dilations": [1, 3]}
        return dilated_attention(**arguments, **patterns, **rates, detach_mixture_weights=detach)

    compare(op, x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("form", "tie", "rotary_dim"), [("slack", "rotary", 64), ("strict", "rotary", 32)])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (5, 300)])
def test_collinear_matches_reference(
    queries: int, keys: int, form: str, tie: str, rotary_dim: int, dtype: torch.dtype
) -> None:
    x = normal(dtype, q=(2, queries, 4, 64), raw=(2, keys, 2, 64), v=(2, keys, 2, 64))
    cos, sin = (y.float().cuda() for y in table(torch.arange(keys).expand(2, -1), rotary_dim))

    def op(q: Tensor, raw: Tensor, v: Tensor, backend: str) -> Tensor:
        t = collinear_coefficients(raw, rotary_dim, tie=tie, backend=backend)
        return collinear_attention(q, t, v, cos, sin, form=form, tie=tie, backend=backend)

    compare(op, x, "reference")
