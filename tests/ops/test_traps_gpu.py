"""What has gone wrong with kernels on cards before: every operator of `farspan bench ops`, wherever it applies."""

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farspan.evaluation import op_tune
from farspan.evaluation.op_cases import CASES
from farspan.evaluation.op_workload import Workload
from farspan.ops import _tiles, dilated_attention, dynamic_mask_attention, gated_linear_attention
from tests import tolerances
from tests.ops import test_attention_kernels_gpu, test_gated_linear, test_kernels_gpu
from tests.ops.checks import Named, assert_close, assert_same, cast, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
LARGE = ("cdmoe_million", "dilated_one_head")
OURS = [name for name, case in CASES.items() if case.peer_of is None and name not in LARGE]
DIFFERENTIABLE = [name for name in OURS if name != "expiry"]
LAYERS = ("doge_attention", "cdmoe", "peer")
# Their backward passes are cuDNN's, which promises no order of sums.
UNORDERED = ("softmax", "softmax_rope", "collinear", "collinear_128", "dilated")
TOOLS = "/usr/local/cuda/bin"


def results(workload: Workload) -> dict[str, Tensor]:
    """The output and all gradients for a fixed weighting."""
    workload.forget()
    out = workload.call(workload.leaves)
    if out.requires_grad:
        generator = torch.Generator("cuda").manual_seed(5)
        # A row's weights do not depend on how many rows there are.
        weight = torch.randn(out.shape[1:], generator=generator, device="cuda")
        out.backward(weight.to(out.dtype).expand_as(out))
    found = {"out": out.detach()} | {"d_" + n: x.grad for n, x in workload.leaves.items() if x.grad is not None}
    return found | {f"d_{i}": x.grad for i, x in enumerate(workload.parameters) if x.grad is not None}


@pytest.mark.parametrize("name", OURS)
def test_two_hundred_launches_between_other_kernels_agree(name: str) -> None:
    workload = CASES[name].make(2, 300, BF16, CUDA)
    first, a = results(workload), torch.randn(1024, 1024, device="cuda", dtype=BF16)
    for _ in range(200):
        a = torch.softmax(a @ a, -1)
        again = results(workload)
        for key, want in first.items():
            if name in UNORDERED and key != "out":
                assert_close(again[key], want, tolerances.BFLOAT16, key)
            else:
                assert torch.equal(again[key], want), key


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_that_is_one_number_seen_everywhere_is_read_as_such(name: str) -> None:
    workload = CASES[name].make(2, 300, BF16, CUDA)
    found = []
    for dense in (True, False):
        workload.forget()
        out = workload.call(workload.leaves)
        out.backward(torch.ones_like(out) if dense else torch.ones((), device="cuda", dtype=out.dtype).expand_as(out))
        found.append({key: x.grad for key, x in workload.leaves.items() if x.grad is not None})
    for key, want in found[0].items():
        assert_close(found[1][key], want, tolerances.BFLOAT16, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", op_tune.TUNED)
def test_every_tile_that_a_tuner_may_choose_gives_the_same(name: str) -> None:
    from triton.errors import TritonError

    workload = CASES[name].make(2, 300, BF16, CUDA)
    with _tiles.trial({}):
        wanted = results(workload)
        choices = _tiles.candidates()
    ran = 0
    for key, (_, *others) in choices.items():
        for tile in others:
            with _tiles.trial({key: tile}):
                try:
                    got = results(workload)
                except TritonError:  # more than the card's shared memory or registers, which a tuner passes over
                    continue
            ran += 1
            for result, want in wanted.items():
                assert_close(got[result], want, tolerances.BFLOAT16, f"{key} {tile}: {result}")
    assert ran


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name not in LAYERS])
def test_more_elements_than_32_bits_count(name: str) -> None:
    """The last of so many rows is the row alone."""
    tokens, case = 2048, CASES[name]
    per_row = max(x.numel() for x in case.make(1, tokens, BF16, CUDA).leaves.values())
    rows = 2**31 // per_row + 2
    try:
        many = case.make(rows, tokens, BF16, CUDA)
        got = {key: x[-1:].clone() for key, x in results(many).items() if x.shape[0] == rows}
        last = {key: x[-1:] if x.shape[0] == rows else x for key, x in many.leaves.items()}
        alone = {key: x.detach().clone().requires_grad_() for key, x in last.items()}
    except torch.OutOfMemoryError:
        pytest.skip("the card's memory is too small")
    finally:
        many = last = None
        torch.cuda.empty_cache()
    # What depends on the number of rows, as tables of positions do, is made for one row.
    one = case.make(1, tokens, BF16, CUDA)
    want = results(Workload(alone, one.call, one.flops))
    for key, right in got.items():
        assert_close(right, want[key], tolerances.BFLOAT16, key)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_no_length_compiles_kernels_of_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.ops import _launch

    def compiled(tokens: int) -> int:
        results(CASES[name].make(2, tokens, BF16, CUDA))
        for begun in list(_launch._pending.values()):
            begun.result()
        return len(list(tmp_path.rglob("*.cubin")))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = compiled(101)
    assert [compiled(tokens) for tokens in (112, 128, 97)] == [first] * 3


def compare(op: Callable[..., object], x: Named, backend: str = "triton") -> None:
    """The kernels against the PyTorch form in float64."""

    def call(backend: str, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        out = op(backend=backend, **tensors)
        out, state = out if isinstance(out, tuple) else (out, None)
        return out.cpu(), torch.zeros(()) if state is None else state.cpu()

    got, want = (
        {name: tensor.cpu() for name, tensor in outputs_and_gradients(partial(call, backend), tensors).items()}
        for backend, tensors in ((backend, x), ("torch", cast(x, torch.float64)))
    )
    assert_same(got, want, 2 * tolerances.BFLOAT16)


def drawn(length: int, width: int, value_width: int, heads: int = 2) -> Named:
    x = test_gated_linear.make(length, "channel", heads=heads, width=width, value_width=value_width)
    exact = {"log_decay", "initial_state"}
    return {n: None if t is None else t.to("cuda", torch.float32 if n in exact else BF16) for n, t in x.items()}


def attended(width: int, bias: bool = False) -> Named:
    x = {name: torch.randn(1, 300, 4, width, device="cuda").to(BF16) for name in "qkv"}
    return x | ({"bias": torch.randn(1, 300, 4, device="cuda")} if bias else {})


GATED = partial(gated_linear_attention, output_final_state=True)
DILATED = partial(dilated_attention, segment_lengths=[64, 300], dilations=[1, 4])
MASKED = partial(dynamic_mask_attention, keep=60)


@pytest.mark.parametrize("kind", ["gated_linear", "dilated", "dynamic_mask"])
def test_an_integer_scale_of_one_is_a_number_like_others(kind: str) -> None:
    if kind == "gated_linear":
        compare(partial(GATED, scale=1), drawn(200, 64, 64))
    else:
        op, bias = (DILATED, False) if kind == "dilated" else (MASKED, True)
        x = {n: t if n in ("v", "bias") else t / 4 for n, t in attended(64, bias).items()}
        compare(partial(op, scale=1), x)


@pytest.mark.parametrize("widths", [(16, 16), (31, 32), (127, 40), (64, 131), (131, 77), (255, 64)], ids=str)
def test_narrow_heads_and_odd_wide_ones(widths: tuple[int, int]) -> None:
    compare(GATED, drawn(300, *widths), "auto")


@pytest.mark.parametrize("width", [16, 24, 32, 120])
def test_narrow_heads_of_attention(width: int) -> None:
    compare(DILATED, attended(width))
    compare(MASKED, attended(width, bias=True))


# Gradients of every mechanism, by tests that take little time.
GRADIENTS: list[Callable[..., None]] = [
    test_an_integer_scale_of_one_is_a_number_like_others,
    test_narrow_heads_and_odd_wide_ones,
    test_narrow_heads_of_attention,
    test_kernels_gpu.test_packed_documents_match_torch,
    test_kernels_gpu.test_packed_cosine_and_duality_match_torch,
    test_attention_kernels_gpu.test_collinear_matches_reference,
    test_attention_kernels_gpu.test_experts_match_torch,
]


@pytest.mark.slow
def test_a_newer_assembler_gives_the_same(tmp_path: Path) -> None:
    assembler = Path(TOOLS) / "ptxas"
    if not assembler.is_file():
        pytest.skip(f"there is no {assembler}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"TRITON_PTXAS_PATH": str(assembler), "TRITON_CACHE_DIR": str(tmp_path)}
    tests = [f"{inspect.getfile(test)}::{test.__name__}" for test in GRADIENTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "not float32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_no_access_out_of_bounds() -> None:
    checker = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), TOOLS)))
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    code = "\n".join((
        "from farspan.evaluation.op_speed import first_call",
        f"for name in {OURS}: first_call(name, '2', '130', 'bfloat16', 'cuda')",
        # Few values: matrix instructions of so few columns have gone wrong.
        "from tests.ops.test_kernels_gpu import test_gated_linear_matches_torch, torch",
        "for decay in ('head', 'channel', 'extreme'):",
        "    for values in (16, 32): test_gated_linear_matches_torch(torch.bfloat16, decay, (64, values))",
    ))  # fmt: skip
    command = [checker, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    # Without torch's own allocator every tensor is an allocation, and has bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
