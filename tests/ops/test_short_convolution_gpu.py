"""The short convolution's kernels on a GPU: every form against the reference in float64, three runs to the bit."""

from functools import partial

import pytest
import torch

from farspan.ops import short_convolution
from tests import tolerances
from tests.ops.checks import Named, assert_same, boundaries, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]


def make(batch: int, length: int, channels: int, sequences: int, dtype: torch.dtype, state: bool) -> Named:
    generator = torch.Generator("cuda").manual_seed(length)
    randn = partial(torch.randn, generator=generator, device="cuda")
    x = {"x": randn(batch, length, channels).to(dtype), "weight": randn(channels, 4), "bias": randn(channels)}
    return x | ({"initial_state": randn(sequences, channels, 4).to(dtype)} if state else {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "lengths"),
    [(2, 1, 64, None), (2, 63, 96, None), (3, 65, 100, None), (1, 4097, 1024, None), (1, 1000, 128, [3, 0, 997])],
)
def test_matches_reference(
    batch: int, length: int, channels: int, lengths: list[int] | None, state: bool, dtype: torch.dtype
) -> None:
    x = make(batch, length, channels, batch if lengths is None else len(lengths), dtype, state)
    cu_seqlens = None if lengths is None else boundaries(lengths).cuda()
    run = partial(short_convolution, cu_seqlens=cu_seqlens, output_final_state=True)
    got, *again = (
        outputs_and_gradients(lambda **t: tuple(y.cpu() for y in run(backend="triton", **t)), x) for _ in range(3)
    )
    exact = {name: tensor.double() for name, tensor in x.items()}
    want = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in run(backend="reference", **t)), exact)
    tolerance = tolerances.FLOAT32 if dtype == torch.float32 else tolerances.BFLOAT16
    assert_same(*({name: tensor.cpu() for name, tensor in found.items()} for found in (got, want)), tolerance)
    assert all(torch.equal(other[name], got[name]) for other in again for name in got)
