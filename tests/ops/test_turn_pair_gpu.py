"""Queries and keys turned by their places on a GPU, against the formula in float64."""

import pytest
import torch
from torch import Tensor

from farspan.nn.positions import xpos_rates
from farspan.ops.dilated.rotation import turn_factors, turn_pair
from tests import tolerances
from tests.ops.checks import assert_same
from tests.ops.test_attention_kernels_gpu import compare, normal, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(16, 4, 64), (3, 1, 40), (5, 5, 128)])
def test_turned_pairs_match_the_formula(heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    x = normal(dtype, q=(2, 333, heads, width), k=(2, 333, groups, width))
    places = torch.arange(333, device="cuda").expand(2, -1)
    factors = turn_factors(places, 100, *(rate.cuda() for rate in xpos_rates(width, 512.0)))

    def op(q: Tensor, k: Tensor, backend: str = "triton") -> Tensor:
        return torch.cat(turn_pair(q, k, *factors, backend=backend), dim=2)

    compare(op, x)
    torch.compiler.reset()
    whole = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(results(whole, x), results(op, x), tolerances.BFLOAT16 / 2)
