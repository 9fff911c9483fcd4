"""The kernel of row-sparse AdamW on a GPU: as exact as the PyTorch form, the same bits every time."""

import pytest
import torch
from torch import Tensor, nn

from farspan.training.row_sparse import RowSparseAdamW, update_rows
from tests import tolerances
from tests.ops.checks import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]


def run(gradients: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(1)
    table = nn.Parameter(torch.randn(gradients.shape[1:], device="cuda").to(dtype))
    optimizer = RowSparseAdamW([{"params": [table], "row_sparse": True}], lr=0.01, weight_decay=0.1)
    for gradient in gradients:
        table.grad = gradient.to(dtype)
        optimizer.step()
    return {"table": table.detach(), **optimizer.state[table]}


@pytest.mark.parametrize("shape", [(3000, 1024), (200, 7), (1000, 2048), (300, 8192)], ids=str)
def test_float32_is_float64_and_repeats(shape: tuple[int, int]) -> None:
    gradients = torch.randn(6, *shape, device="cuda")
    gradients[torch.rand(6, shape[0], device="cuda") < 0.7] = 0
    found, again, wanted = run(gradients, torch.float32), run(gradients, torch.float32), run(gradients, torch.float64)
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert_close(x, wanted[name].to(x.dtype) if name == "step" else wanted[name], tolerances.FLOAT32, name)


def test_two_hundred_launches_leave_other_rows_alone() -> None:
    names = ("table", "exp_avg", "exp_avg_sq", "step")
    held = [torch.rand(4096, 384, device="cuda") for _ in names[:3]] + [torch.zeros(4096, device="cuda")]
    before, other = [x.clone() for x in held], torch.randn(1024, 1024, device="cuda")
    gradient = torch.randn(4096, 384, device="cuda")
    still = torch.rand(4096, device="cuda") < 0.5
    gradient[still] = 0
    from farspan.training.row_sparse_kernel import update_rows_triton

    wanted = [x.clone() for x in held]
    for _ in range(200):
        torch.mm(other, other)
        update_rows_triton(held[0], gradient, *held[1:], 0.01, (0.9, 0.95), 1e-8, 0.001)
        update_rows(wanted[0], gradient, *wanted[1:], 0.01, (0.9, 0.95), 1e-8, 0.001)
    for name, x, old, want in zip(names, held, before, wanted, strict=True):
        assert torch.equal(x[still], old[still])
        assert_close(x, want, 1e-4, name)
    assert torch.equal(held[3], 200.0 * ~still)
