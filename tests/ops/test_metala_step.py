"""A decoding step of MetaLA is one token of the whole operator, and changes its state in place."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.errors import BackendUnavailable, ShapeError
from farspan.ops.metala.api import metala_attention
from farspan.ops.metala.step import metala_step
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED

OPTIONS = [
    {},
    {"augmentation_inside": False, "scale": 1.0, "decay_normalizer": 2.0},
    {"normalize": False},
]


def make(length: int, dtype: torch.dtype, key: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "q": draw(2, length, 3, 5),
        "gate_logits": 8 * draw(2, length, 3, 5),
        "v": draw(2, length, 3, 7),
        "augmentation": draw(3, 5),
        "key": draw(2, length, 3, 5) if key else None,
    }


def step_by_step(x: dict[str, Tensor | None], state: Tensor, backend: str, **options: object) -> Tensor:
    rows = [
        {name: value if value is None or name == "augmentation" else value[:, t : t + 1] for name, value in x.items()}
        for t in range(x["q"].shape[1])
    ]
    return torch.cat([metala_step(**row, state=state, backend=backend, **options) for row in rows], dim=1)


def check(backend: str, dtype: torch.dtype, tolerance: float, key: bool, options: dict) -> None:
    x = make(6, dtype, key)
    start = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = start.to(torch.promote_types(dtype, torch.float32), copy=True)
    kept = state
    out = step_by_step(x, state, backend, **options)
    wide = {name: value if value is None else value.double() for name, value in x.items()}
    want, final = metala_attention(**wide, initial_state=start, output_final_state=True, backend="reference", **options)
    assert state is kept
    assert_close(out, want, tolerance)
    assert_close(state, final, tolerances.FLOAT32 if dtype != torch.float64 else tolerances.FLOAT64, "state")


@pytest.mark.skipif(INTERPRETED, reason="the PyTorch form is tested without the interpreter")
@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_are_the_whole_operator(options: dict, key: bool) -> None:
    check("torch", torch.float64, tolerances.FLOAT64, key, options)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_kernel_steps_are_the_whole_operator(
    options: dict, key: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farspan.ops import _backend

    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)
    check("triton", dtype, {torch.float32: tolerances.FLOAT32, torch.float16: 2e-3}[dtype], key, options)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_kernel_reads_slices_of_one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.ops import _backend

    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)
    joined = torch.randn(2, 1, 15 + 15 + 21 + 21)
    q, z, v, gate = (part.unflatten(-1, (3, -1)) for part in joined.split([15, 15, 21, 21], dim=-1))
    arguments = {"q": q, "gate_logits": z, "v": v, "augmentation": torch.randn(3, 5), "output_gate": gate}
    first, second = torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 5, 7)
    got = metala_step(**arguments, state=first, backend="triton")
    assert_close(got, metala_step(**arguments, state=second, backend="torch"), tolerances.FLOAT32)
    assert_close(first, second, tolerances.FLOAT32, "state")


@pytest.mark.skipif(INTERPRETED, reason="the PyTorch form is tested without the interpreter")
def test_output_gate_is_applied_after_the_norm() -> None:
    x, gate = make(1, torch.float64, False), torch.randn(2, 1, 3, 7, dtype=torch.float64)
    plain = metala_step(**x, state=torch.zeros(2, 3, 5, 7, dtype=torch.float64))
    gated = metala_step(**x, state=torch.zeros(2, 3, 5, 7, dtype=torch.float64), output_gate=gate)
    assert_close(gated, F.silu(gate) * plain, tolerances.FLOAT64)


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel")
def test_what_cannot_be_a_step_is_refused() -> None:
    x, state = make(2, torch.float32, False), torch.zeros(2, 3, 5, 7)
    with pytest.raises(ShapeError, match=r"q has shape .*T=1 \(from a step\)"):
        metala_step(**x, state=state)
    x = make(1, torch.float32, False)
    with pytest.raises(ShapeError, match=r"contiguous tensor of torch\.float32"):
        metala_step(**x, state=state.bfloat16())
    with pytest.raises(ShapeError, match="contiguous"):
        metala_step(**x, state=torch.zeros(2, 3, 7, 5).transpose(2, 3))
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="metala_step"):
            metala_step(**x, state=state, backend="triton")
