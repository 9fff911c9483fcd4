"""The kernels of cosine attention and of state space duality compile for the cards they are made for."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from farspan.ops.gated_linear import rows
from farspan.ops.gated_linear.walk_kernels import walk_kernel
from farspan.ops.ssd import gradient_kernels, kernels, triton
from tests.ops.test_kernels_compiled import SHARED_MEMORY, compiled, stack_bytes

pytestmark = pytest.mark.slow

SPILLED_BYTES = 128
SWITCHES = (
    "UNIT", "A", "B", "FACTOR", "JACOBIAN", "REVERSE", "HAS_START", "TURNED", "STORE_OUT", "STORE_END", "STORE_LOST",
    "STORE_SCALES",
)  # fmt: skip
# The walks of cosine attention: outputs, gradients of queries, values and keys, and states alone.
WALKS = {
    "outputs": {"UNIT", "FACTOR", "STORE_OUT", "STORE_END", "STORE_SCALES"},
    "queries": {"B", "FACTOR", "JACOBIAN", "HAS_START", "TURNED", "STORE_OUT"},
    "values": {"A", "B", "FACTOR", "REVERSE", "HAS_START", "STORE_OUT", "STORE_END"},
    "keys": {"B", "FACTOR", "JACOBIAN", "REVERSE", "HAS_START", "TURNED", "STORE_OUT"},
    "segments": {"UNIT", "FACTOR", "STORE_END", "STORE_LOST"},
    "ends": {"B", "FACTOR", "REVERSE", "STORE_END", "STORE_LOST"},
}
EVERYTHING = {"HAS_SKIP", "HAS_START", "HAS_INITIAL", "STORE_STATES", "STORE_END", "STORE_LOST"}
GROUPS = {
    "states": (kernels.state_kernel, triton.STATE, 0, ("REVERSE", 0), ("BV", rows.NARROWEST)),
    "output": (kernels.output_kernel, triton.OUTPUT, 1),
    "gradients of states": (kernels.state_kernel, triton.STATE, 0, ("REVERSE", 1), ("BV", rows.NARROWEST)),
    "queries": (gradient_kernels.shared_gradient_kernel, triton.SHARED, 2, ("LATER", 0)),
    "keys": (gradient_kernels.shared_gradient_kernel, triton.SHARED, 2, ("LATER", 1)),
    "values": (gradient_kernels.value_gradient_kernel, triton.VALUE, 2),
}


def check(
    kernel: Any,
    constants: Any,
    architecture: int,
    dtype: torch.dtype,
    common: bool,
    directory: Path,
) -> None:
    """Shared memory of every form; spills and matrix instructions of those that matter for speed."""
    binary = compiled(kernel, architecture, dtype, dict(constants), rows.WARPS, constants["STAGES"], None)
    assert binary.metadata.shared <= SHARED_MEMORY[architecture], f"{binary.metadata.shared} bytes shared"
    if common and architecture == 90 and dtype == torch.bfloat16:
        assert "wgmma.mma_async" in binary.asm["ptx"], "no warp-group matrix instruction"
        assert stack_bytes(binary, directory) <= SPILLED_BYTES


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("walk", WALKS)
def test_walks_compile(walk: str, width: int, dtype: torch.dtype, architecture: int, tmp_path: Path) -> None:
    switches = (1 if name in WALKS[walk] else 0 for name in SWITCHES)
    constants = rows._constants(dtype, width, width, rows.CHUNK, *switches)
    check(walk_kernel, constants, architecture, dtype, width == 64, tmp_path)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("values", [64, 128])
@pytest.mark.parametrize("name", GROUPS)
def test_group_kernels_compile(name: str, values: int, dtype: torch.dtype, architecture: int, tmp_path: Path) -> None:
    width = 64 if dtype == torch.float32 else 128
    if not triton.holds(dtype, width, values):
        pytest.skip("gated linear attention's kernels serve this width in float32")
    kernel, most, tiles, *switches = GROUPS[name]
    constants = triton._constants(dtype, width, values, rows.CHUNK, most, tiles, *switches)
    check(kernel, constants | dict.fromkeys(EVERYTHING, True), architecture, dtype, values == 64, tmp_path)


@pytest.mark.parametrize("architecture", [80, 90])
def test_steps_compile(architecture: int, tmp_path: Path) -> None:
    kernels_of_steps = {None: kernels.prepare_kernel, 1: gradient_kernels.step_gradient_kernel}
    for blocks, kernel in kernels_of_steps.items():
        constants = triton._step_constants(16, rows.CHUNK, True, True, blocks) | {"STAGES": 1}
        check(kernel, constants, architecture, torch.bfloat16, False, tmp_path)
