"""Operators, the loss and the optimiser on one GPU while another is the current one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from farspan.evaluation.op_cases import CASES
from farspan.nn.losses import chunked_cross_entropy
from farspan.training.row_sparse import RowSparseAdamW
from tests import tolerances
from tests.ops.checks import Named, assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]
OTHER = torch.device("cuda:1")
# Peers, and what takes more memory or tokens than a test should.
LEFT_OUT = {"cdmoe_million", "dilated_one_head"}
# Part of an operator, inside its node: torch.compile never sees it.
INSIDE = {"expiry"}


def compare(run: Callable[[], Named]) -> None:
    """What `run` gives is the same whichever device is current."""
    found = []
    for current in (OTHER, torch.device("cuda:0")):
        with torch.cuda.device(current):
            results = run()
        torch.cuda.synchronize(OTHER)
        found.append({name: x.detach().float().cpu() for name, x in results.items()})
    assert all(x.isfinite().all() for x in found[0].values())
    assert_same(found[1], found[0], tolerances.BFLOAT16 / 2)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        (name, compiled)
        for name, case in CASES.items()
        for compiled in (False, True)
        if case.peer_of is None and name not in LEFT_OUT and not (compiled and name in INSIDE)
    ],
)
def test_operators(name: str, compiled: bool) -> None:
    workload = CASES[name].make(2, 330, torch.bfloat16, OTHER)
    torch.compiler.reset()
    call = torch.compile(workload.call, backend="aot_eager", fullgraph=True) if compiled else workload.call

    def run() -> Named:
        workload.forget()
        out = call(workload.leaves)
        if out.requires_grad:
            torch.autograd.backward(out, torch.ones_like(out))
        gradients: dict[str, Tensor | None] = {name: x.grad for name, x in workload.leaves.items()}
        return {"out": out} | {name: x for name, x in gradients.items() if x is not None}

    compare(run)


def test_loss_and_optimiser() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).to(OTHER) for size in ((100, 64), (1000, 64)))
    labels = torch.randint(0, 1000, (100,), generator=generator).to(OTHER)

    def run() -> Named:
        table, rows = (nn.Parameter(x.clone()) for x in (weight, hidden))
        optimizer = RowSparseAdamW([{"params": [table], "row_sparse": True}, {"params": [rows]}], lr=0.1)
        loss = chunked_cross_entropy(rows, table, labels)
        loss.backward()
        optimizer.step()
        return {"loss": loss, "table": table, "rows": rows}

    compare(run)
