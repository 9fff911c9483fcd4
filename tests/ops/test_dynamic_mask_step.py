"""One decoding step of dynamic mask attention: the memory that it changes, and the same numbers from the kernels."""

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops.dynamic_mask.api import dynamic_mask_attention
from farspan.ops.dynamic_mask.step import LiveKeys, dynamic_mask_step, dynamic_mask_step_torch
from farspan.ops.rotary import apply_rotary
from tests import tolerances
from tests.ops.checks import assert_close
from tests.ops.conftest import INTERPRETED

ROWS, HEADS, GROUPS, WIDTH = 2, 4, 2, 8


def nothing_yet(
    slots: int, sharing: int, device: str = "cpu", dtype: torch.dtype = torch.float32, width: int = WIDTH
) -> LiveKeys:
    def empty(*more: int, fill: float = 0.0) -> Tensor:
        return torch.full((ROWS, slots, GROUPS, *more), fill, device=device)

    keys, values, biases = empty(width).to(dtype), empty(width - 2).to(dtype), empty(sharing)
    born = torch.zeros(ROWS, slots, GROUPS, dtype=torch.int32, device=device)
    seen = torch.zeros(ROWS, dtype=torch.int32, device=device)
    return LiveKeys(keys, values, biases, empty(sharing, fill=float("-inf")), born, seen)


def text(length: int, sharing: int, tied: bool = True, device: str = "cpu", width: int = WIDTH) -> list[Tensor]:
    """Queries, keys, values, biases with ties, among them both zeros, and the rotation."""
    torch.manual_seed(length)
    sizes = ((HEADS, width), (GROUPS, width), (GROUPS, width - 2), (GROUPS * sharing,))
    q, k, v, bias = (torch.randn(ROWS, length, *size) for size in sizes)
    angles = torch.rand(ROWS, length, width // 2)
    return [x.to(device) for x in (q, k, v, bias.round() if tied else bias, angles.cos(), angles.sin())]


def stepped(
    parts: list[Tensor], live: LiveKeys, keep: int, backend: str, hidden: Tensor | None = None, **more: object
) -> Tensor:
    outs, ranking = [], parts[3]
    if hidden is not None:
        ranking = ranking.masked_fill(hidden, float("-inf"))
    for t in range(parts[0].shape[1]):
        q, k, v, bias, cos, sin, order = (x[:, t : t + 1] for x in (*parts, ranking))
        step = dynamic_mask_step(q, k, v, bias, order, live, keep=keep, cos=cos, sin=sin, backend=backend, **more)
        outs.append(step)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize("keep", [1, 5, 40])
def test_steps_equal_the_whole(keep: int, sharing: int) -> None:
    parts = text(30, sharing)
    q, k, v, bias, cos, sin = parts
    live = nothing_yet(keep * sharing, sharing)
    want = dynamic_mask_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, bias, keep=keep)
    assert_close(stepped(parts, live, keep, "torch"), want, tolerances.FLOAT32)
    assert live.seen.tolist() == [30] * ROWS


def test_norms_come_before_the_rotation() -> None:
    parts, norms = text(12, 1), (torch.randn(WIDTH), torch.randn(WIDTH))
    normed = [torch.nn.functional.rms_norm(x, (WIDTH,), w, 0.1) for x, w in zip(parts[:2], norms, strict=True)]
    memories = [nothing_yet(5, 1) for _ in range(2)]
    want = stepped(normed + parts[2:], memories[0], 5, "torch")
    assert_close(stepped(parts, memories[1], 5, "torch", norms=norms, norm_eps=0.1), want, tolerances.FLOAT32)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs the kernels on a CPU")
@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize(
    ("keep", "length", "before", "tied"), [(1, 6, 0, True), (5, 24, 0, True), (40, 10, 0, False), (70, 75, 66, True)]
)
def test_kernels_match_the_formulas(
    keep: int, length: int, before: int, tied: bool, sharing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`before` tokens are read by the formulas in both memories, which the kernels then go on with."""
    from farspan.ops.dynamic_mask import step_triton

    monkeypatch.setattr(step_triton, "SLOTS", 16)
    monkeypatch.setattr("tests.ops.test_dynamic_mask_step.dynamic_mask_step", run_kernels)
    parts = text(length, sharing, tied)
    hidden = torch.arange(length).reshape(1, -1, 1) % 7 == torch.arange(ROWS).reshape(-1, 1, 1)
    memories = [nothing_yet(keep * sharing, sharing) for _ in range(2)]
    norms = (torch.rand(WIDTH), torch.rand(WIDTH)) if tied else None
    first, rest = ([x[:, part] for x in (*parts, hidden)] for part in (slice(before), slice(before, None)))
    if before:
        for live in memories:
            stepped(first[:-1], live, keep, "torch", first[-1], norms=norms)
    want, got = (
        stepped(rest[:-1], live, keep, name, rest[-1], norms=norms)
        for live, name in zip(memories, ("torch", "triton"), strict=True)
    )
    assert_close(got, want, tolerances.FLOAT32)
    for name, a, b in zip(LiveKeys._fields, *memories, strict=True):
        torch.testing.assert_close(b, a, msg=lambda text, name=name: f"{name}: {text}")


def run_kernels(*tensors: object, backend: str, **options: object) -> Tensor:
    from farspan.ops.dynamic_mask.step_triton import dynamic_mask_step_triton

    call = dynamic_mask_step_triton if backend == "triton" else dynamic_mask_step_torch
    return call(*tensors, scale=WIDTH**-0.5, norm_eps=1e-6, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize("keep", [1, 60, 300])
def test_kernels_on_a_card_match_the_formulas(keep: int, sharing: int) -> None:
    parts = text(350, sharing, device="cuda")
    memories = [nothing_yet(keep * sharing, sharing, "cuda") for _ in range(3)]
    want, got, again = (
        stepped(parts, live, keep, name) for live, name in zip(memories, ("torch", "triton", "triton"), strict=True)
    )
    assert_close(got, want, tolerances.FLOAT32)
    assert torch.equal(got, again)
    assert all(torch.equal(a, b) for a, b in zip(memories[0][3:], memories[1][3:], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("keep", "sharing", "width"), [(1, 2, 64), (60, 1, 66), (90, 2, 128), (400, 1, 64)])
def test_kernels_on_a_card_are_as_exact_as_the_formulas(
    keep: int, sharing: int, width: int, dtype: torch.dtype
) -> None:
    """Within twice the error of the PyTorch form of the same dtype, against float64."""
    q, k, v, bias, cos, sin = text(200, sharing, False, "cuda", width)
    parts, wide = ([x.to(dtype).to(to) for x in (q, k, v)] + [bias, cos, sin] for to in (dtype, torch.float64))
    memories = [nothing_yet(keep * sharing, sharing, "cuda", to, width) for to in (torch.float64, dtype, dtype)]
    norms = [torch.rand(width, device="cuda").to(dtype) for _ in range(2)]
    want = stepped(wide, memories[0], keep, "torch", norms=[x.double() for x in norms])
    plain, got = (
        stepped(parts, live, keep, name, norms=norms)
        for live, name in zip(memories[1:], ("torch", "triton"), strict=True)
    )
    ours, theirs = (float((x - want).abs().max() / want.abs().max()) for x in (got, plain))
    assert ours <= 2 * theirs + 1e-6, (ours, theirs)


def test_a_step_is_checked() -> None:
    q, k, v, bias, cos, sin = (x[:, :1] for x in text(3, 1))
    live = nothing_yet(4, 1)
    with pytest.raises(ConfigError, match="keep=0 must be at least 1"):
        dynamic_mask_step(q, k, v, bias, bias, live, keep=0)
    with pytest.raises(ShapeError, match="M=2 bias heads have to be G=2 times R=2"):
        dynamic_mask_step(q, k, v, bias, bias, nothing_yet(4, 2), keep=2)
    turned = live._replace(keys=live.keys.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ShapeError, match="changed in place and have to be contiguous"):
        dynamic_mask_step(q, k, v, bias, bias, turned, keep=4, cos=cos, sin=sin)
