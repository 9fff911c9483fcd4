"""Cross entropy in place: PyTorch's loss, its gradient where the logits were."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from farspan.errors import ShapeError
from farspan.ops import _backend
from farspan.ops.cross_entropy.api import cross_entropy_in_place
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED

BACKEND = "triton" if INTERPRETED else "torch"
TOLERANCE = {torch.float64: tolerances.FLOAT64, torch.float32: tolerances.FLOAT32, torch.float16: 1e-3}
ROWS, CLASSES = 6, 4100  # more than one block of columns


@pytest.fixture(autouse=True)
def _serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)


def make(dtype: torch.dtype, columns: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Logits of some range, of which room behind the classes holds anything; one label is not scored."""
    logits = (4 * torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[:, CLASSES:] = 100.0
    logits[1, 7] = -torch.inf
    return logits, torch.tensor([0, CLASSES - 1, -100, 7, 4095, 4096])


@pytest.mark.parametrize("columns", [CLASSES, 4160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if INTERPRETED else [torch.float64, torch.float16])
def test_loss_and_gradient_are_those_of_pytorch(dtype: torch.dtype, columns: int) -> None:
    logits, labels = make(dtype, columns)
    exact = logits[:, :CLASSES].double().requires_grad_()
    want = cross_entropy(exact, labels, reduction="none")
    (slope,) = torch.autograd.grad(want.sum(), exact)
    kept = logits.clone()
    got = cross_entropy_in_place(logits, labels, classes=CLASSES, slope=False, backend=BACKEND)
    assert torch.equal(logits, kept)
    again = cross_entropy_in_place(logits, labels, classes=CLASSES, backend=BACKEND)
    assert torch.equal(got, again)
    assert_close(got, want.detach(), TOLERANCE[torch.float32] if dtype == torch.float16 else TOLERANCE[dtype])
    assert_close(logits[:, :CLASSES], slope, TOLERANCE[dtype])
    assert not logits[:, CLASSES:].any()
    assert not logits[2].any()


def test_rows_that_are_not_scored_may_hold_anything() -> None:
    logits, labels = make(torch.float32)
    logits[2, ::2] = torch.nan
    assert cross_entropy_in_place(logits, labels, backend=BACKEND)[2] == 0
    assert not logits[2].any()


def test_a_logit_that_is_no_number_is_not_hidden() -> None:
    logits, labels = make(torch.float32)
    logits[3, 5] = torch.nan
    assert cross_entropy_in_place(logits, labels, backend=BACKEND).isnan().tolist() == [False] * 3 + [
        True,
        False,
        False,
    ]


@pytest.mark.skipif(not INTERPRETED, reason="PyTorch's form refuses by itself")
def test_a_label_behind_the_classes_gives_no_number() -> None:
    logits, labels = make(torch.float32, 4160)
    labels[0] = CLASSES
    nll = cross_entropy_in_place(logits, labels, classes=CLASSES, backend=BACKEND)
    assert nll.isnan().tolist() == [True] + [False] * 5


def test_a_backward_pass_through_overwritten_logits_is_refused() -> None:
    logits, labels = make(torch.float32)
    z = logits.requires_grad_().exp()  # which is saved
    cross_entropy_in_place(z, labels, backend=BACKEND)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_shapes_are_checked() -> None:
    with pytest.raises(ShapeError, match=r"expected int64 \[N\] beside contiguous \[N, S\]"):
        cross_entropy_in_place(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
