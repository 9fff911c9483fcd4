"""No kernel and no node of PyTorch goes untested: each has run in the interpreter, in float32 and in float16."""

import pytest
import torch

from tests.ops import recording
from tests.ops.test_every_kernel import TESTS, kernels

RUNNING = ("test_*_interpreted.py", "test_*step.py", "test_*steps.py")
# Kernels whose tensors are integers or float32 whatever the model's type: plans, states, sums, moments.
ONE_TYPE = {
    "dynamic_mask.expiry_kernels": {
        "window_kernel", "expiry_kernel", "link_kernel", "hop_kernel", "birth_kernel", "newest_kernel",
    },
    "gated_linear.kernels": {"scan_kernel"},
    "ssd.kernels": {"prepare_kernel"},
    "ssd.gradient_kernels": {"step_gradient_kernel"},
    "training.row_sparse_kernel": {"row_adamw_kernel"},
}  # fmt: skip
# Nodes of forms in PyTorch, which `test_compile.py` and `test_short_convolution.py` hold against what they declare.
FORMS = ("gated_linear_chunked", "short_convolution", "softmax_packed", "dilated_packed", "dynamic_mask_live")
ELSEWHERE = {f"farspan::{name}{part}" for name in FORMS for part in ("", "_gradient")}
ELSEWHERE |= {"farspan::dynamic_mask_thresholds", "farspan::dynamic_mask_slots"}


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> None:
    """Skips where not all tests that run kernels have run."""
    wanted = {path for pattern in RUNNING for path in TESTS.glob(pattern)}
    chosen = {item.path for item in request.session.items}
    options = request.config.option
    if wanted - chosen or options.keyword or options.markexpr or request.session.testsfailed:
        pytest.skip("needs all of `make test-kernels`, without a failure")


@pytest.mark.usefixtures("everything")
def test_every_kernel_has_run_in_float32_and_float16() -> None:
    missing = []
    for kernel in kernels():
        _, *module, name = kernel.split(".")
        fixed = name in ONE_TYPE.get(".".join(module[-2:]), ())
        ran = recording.KERNELS.get(kernel, set())
        wanted = ran if fixed else {torch.float32, torch.float16}
        missing += [f"{kernel} never ran in {dtype}" for dtype in sorted(wanted - ran, key=str)]
        missing += [] if ran else [f"{kernel} never ran"]
    assert not missing, "\n".join(missing)


@pytest.mark.usefixtures("everything")
def test_every_node_has_run() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.partition(".")[0] for name in names if name.startswith("farspan::")}
    assert registered >= ELSEWHERE, f"no nodes any more: {sorted(ELSEWHERE - registered)}"
    missing = registered - recording.NODES - ELSEWHERE
    assert not missing, f"never ran: {sorted(missing)}"
