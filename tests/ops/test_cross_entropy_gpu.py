"""Cross entropy in place on a GPU: as precise as PyTorch's operations, the same at every run, inside of a head."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from farspan.nn import losses
from farspan.nn.losses import chunked_cross_entropy
from farspan.ops.cross_entropy.api import cross_entropy_in_place

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "classes", "columns"), [(1, 1, 1), (5, 259, 320), (300, 32000, 32000), (64, 100277, 100288)]
)
def test_precision(rows: int, classes: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    logits = (5 * torch.randn(rows, columns, device="cuda", generator=generator)).to(dtype)
    labels = torch.randint(classes, (rows,), device="cuda", generator=generator)
    labels[::3] = -100
    exact = logits[:, :classes].double().requires_grad_()
    nll = cross_entropy(exact, labels, reduction="none")
    (slope,) = torch.autograd.grad(nll.sum(), exact)
    nll = nll.detach()

    def errors(backend: str) -> list[float]:
        found = []
        for _ in range(3):
            z = logits.clone()
            found.append((cross_entropy_in_place(z, labels, classes=classes, backend=backend), z))
        assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))
        loss, z = found[0]
        assert not z[:, classes:].any()
        assert not z[::3].any()
        return [float((loss.double() - nll).abs().max()), float((z[:, :classes].double() - slope).abs().max())]

    for ours, theirs in zip(errors("triton"), errors("torch"), strict=True):
        assert ours <= 2 * theirs + 1e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("classes", [512, 1003])
def test_head(classes: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", {True: 64 * classes})
    draws = [_head_errors(classes, bias, seed) for seed in range(16)]
    for ours, theirs, largest in torch.tensor(draws).amax(0).unbind(1):  # of a loss one draw alone is chance
        assert ours <= 2 * theirs + 1e-6 * largest


def _head_errors(classes: int, bias: bool, seed: int) -> list[list[float]]:
    """Errors of loss and gradients, those of the same-dtype form, and the largest entries."""
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden, weight, offset = (
        torch.randn(shape, device="cuda", generator=generator).requires_grad_()
        for shape in ((1, 150, 96), (classes, 96), (classes,))
    )
    with torch.no_grad():
        weight /= 96**0.5  # logits that a rounding of 16 bits does not exchange
    leaves = (hidden, weight, offset) if bias else (hidden, weight)
    labels = torch.randint(classes, (1, 150), device="cuda", generator=generator)
    labels[0, :9] = -100

    def results(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    with torch.autocast("cuda", torch.bfloat16):
        ours = results(chunked_cross_entropy(hidden, weight, labels, offset if bias else None))
        logits = linear(hidden, weight, offset if bias else None)
        plain = results(cross_entropy(logits.flatten(0, 1), labels.flatten()))
    logits = linear(hidden.double(), weight.double(), offset.double() if bias else None)
    want = results(cross_entropy(logits.flatten(0, 1), labels.flatten()))
    errors = [[float((x.double() - y).abs().max()) for x, y in zip(side, want, strict=True)] for side in (ours, plain)]
    return [*errors, [float(y.abs().max()) for y in want]]
