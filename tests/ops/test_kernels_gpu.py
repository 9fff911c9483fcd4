"""The Triton kernels on a GPU: every form against the PyTorch form, packed and padded, repeated to catch races."""

from functools import partial

import pytest
import torch

from farspan.ops import gated_linear_attention, metala_attention
from tests import tolerances
from tests.ops import test_gated_linear, test_metala
from tests.ops.checks import Named, assert_same, boundaries, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
WIDTHS = [(64, 128), (32, 48), (20, 33), (128, 128), (128, 200)]
FORMS = [
    *((torch.bfloat16, widths) for widths in WIDTHS),
    *((torch.float32, widths) for widths in WIDTHS[:3]),
    (torch.float16, WIDTHS[0]),
]


def on_gpu(tensors: Named, dtype: torch.dtype) -> Named:
    """Everything in `dtype` but states and decays, which stay in float32."""
    exact = {"log_decay", "initial_state", "augmentation"}
    return {
        name: None if x is None else x.to("cuda", torch.float32 if name in exact else dtype)
        for name, x in tensors.items()
    }


def double(tensors: Named) -> Named:
    return {name: None if x is None else x.double() for name, x in tensors.items()}


def compare(op: partial, x: Named, tolerance: float) -> None:
    """The kernels on `x` against the PyTorch form on the same numbers in float64."""
    got = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in op(backend="triton", **t)), x)
    want = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in op(backend="torch", **t)), double(x))
    got, want = ({name: tensor.cpu() for name, tensor in results.items()} for results in (got, want))
    if x["q"].dtype == torch.float16:
        # A gradient below float16's smallest number is what is left of q dq - k dk, and rounds as these terms do.
        limits = torch.finfo(torch.float16)
        term = float((x["q"].cpu().double() * want["d_q"]).abs().max())
        for name in [name for name, tensor in want.items() if tensor.abs().max() < limits.smallest_normal]:
            assert got.pop(name).abs().max() <= limits.eps * term + limits.smallest_normal, name
            del want[name]
    assert_same(got, want, tolerance)


@pytest.mark.parametrize(("dtype", "widths"), FORMS, ids=str)
@pytest.mark.parametrize("decay", ["none", "head", "channel", "forgetful", "extreme"])
def test_gated_linear_matches_torch(dtype: torch.dtype, decay: str, widths: tuple[int, int]) -> None:
    x = on_gpu(test_gated_linear.make(300, decay, heads=3, width=widths[0], value_width=widths[1]), dtype)
    tolerance = tolerances.FLOAT32 if dtype == torch.float32 else 2 * tolerances.BFLOAT16
    compare(partial(gated_linear_attention, output_final_state=True), x, tolerance)


@pytest.mark.parametrize("lengths", [[700, 0, 1, 64, 1300, 63], [0, 0, 65]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_documents_match_torch(dtype: torch.dtype, lengths: list[int]) -> None:
    cu_seqlens = boundaries(lengths).cuda()
    x = on_gpu(test_gated_linear.make(sum(lengths), batch=1, sequences=len(lengths), width=64, value_width=128), dtype)
    tolerance = tolerances.FLOAT32 if dtype == torch.float32 else 2 * tolerances.BFLOAT16
    compare(partial(gated_linear_attention, output_final_state=True, cu_seqlens=cu_seqlens), x, tolerance)


@pytest.mark.parametrize("options", test_metala.OPTIONS.values(), ids=test_metala.OPTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_metala_matches_torch(options: dict[str, object], padded: bool) -> None:
    x = on_gpu(test_metala.make(500), torch.float32)
    mask = torch.rand(2, 500, device="cuda") < 0.7 if padded else None

    def op(**arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, state = metala_attention(output_final_state=True, padding_mask=mask, **arguments, **options)
        return out if mask is None else out * mask[..., None, None], state

    compare(partial(op), x, tolerances.FLOAT32)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_repeated_calls_agree(widths: tuple[int, int]) -> None:
    x = on_gpu(test_gated_linear.make(1100, heads=4, width=widths[0], value_width=widths[1]), torch.bfloat16)
    leaves = {name: None if t is None else t.requires_grad_() for name, t in x.items()}
    first: list[torch.Tensor] = []
    for _ in range(100):
        out, state = gated_linear_attention(**leaves, output_final_state=True, backend="triton")
        inputs = [leaf for leaf in leaves.values() if leaf is not None]
        results = [out, state, *torch.autograd.grad([out.float().sum() + state.sum()], inputs)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
