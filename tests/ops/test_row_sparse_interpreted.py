"""The kernel of row-sparse AdamW in Triton's interpreter, against the PyTorch form."""

import pytest
import torch

from farspan.training.row_sparse import update_rows
from farspan.training.row_sparse_kernel import update_rows_triton
from tests import tolerances
from tests.ops.checks import assert_close


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.99)])
@pytest.mark.parametrize("width", [1, 7, 16])
def test_kernel_moves_the_rows_of_the_torch_form(width: int, betas: tuple[float, float]) -> None:
    names = ("table", "exp_avg", "exp_avg_sq", "step")
    table = torch.randn(9, width)
    found = dict(zip(names, (table, torch.zeros(9, width), torch.zeros(9, width), torch.zeros(9)), strict=True))
    wanted = {name: x.double() for name, x in found.items()}
    for number in range(5):
        gradient = torch.randn(9, width)
        gradient[torch.rand(9) < 0.5] = 0
        gradient[3] = 0
        before = {name: x.clone() for name, x in found.items()}
        for update, held in ((update_rows_triton, found), (update_rows, wanted)):
            update(
                gradient=gradient.to(held["table"].dtype),
                rate=0.1 / (number + 1),
                betas=betas,
                epsilon=1e-8,
                shrink=0.01,
                **held,
            )
        for name in names:
            assert_close(found[name], wanted[name], tolerances.FLOAT32, name)
            assert torch.equal(found[name][3], before[name][3])


def test_a_backward_pass_through_a_changed_table_is_refused() -> None:
    table, x = torch.randn(9, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    out = (table @ x).sum()
    with torch.no_grad():
        moments = torch.zeros(9, 4), torch.zeros(9, 4), torch.zeros(9)
        update_rows_triton(table, torch.ones(9, 4), *moments, 0.1, (0.9, 0.95), 1e-8, 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
