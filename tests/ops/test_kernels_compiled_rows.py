"""The kernels of cosine attention and of state space duality compile for the cards they are made for."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from farspan.ops.gated_linear import rows
from farspan.ops.gated_linear.walk_kernels import walk_kernel
from farspan.ops.ssd import gradient_kernels, kernels, triton
from tests.ops.test_kernels_compiled import CASES, chunk_of, fits

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize(("architecture", "dtype", "width"), CASES, ids=str)
@pytest.mark.parametrize("walk", WALKS)
def test_walks_compile(walk: str, width: int, dtype: torch.dtype, architecture: int, tmp_path: Path) -> None:
    switches = (1 if name in WALKS[walk] else 0 for name in SWITCHES)
    values, warps = rows._constants(dtype, width, width, chunk_of(architecture, dtype), architecture // 10, *switches)
    fits(walk_kernel, architecture, dtype, values, (warps, values["STAGES"], None), tmp_path)


@pytest.mark.parametrize(("architecture", "dtype", "width"), CASES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_group_kernels_compile(name: str, width: int, dtype: torch.dtype, architecture: int, tmp_path: Path) -> None:
    kernel, most, tiles, *switches = GROUPS[name]
    state = 64 if dtype == torch.float32 else 128
    if not triton.holds(dtype, state, width):
        pytest.skip("gated linear attention's kernels serve this width in float32")
    values = triton._constants(dtype, state, width, chunk_of(architecture, dtype), most, tiles, *switches)
    values = dict(values) | dict.fromkeys(EVERYTHING, True)
    warps = triton._warps(architecture // 10, (values["BK"], values["BV"], dtype.itemsize))
    # Gradients of queries are summed over heads with their decays, which comes between the products of two heads.
    apart = name == "queries"
    fits(kernel, architecture, dtype, values, (warps, values["STAGES"], None), tmp_path, apart)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps_compile(dtype: torch.dtype, architecture: int, tmp_path: Path) -> None:
    kernels_of_steps = {None: kernels.prepare_kernel, 1: gradient_kernels.step_gradient_kernel}
    for blocks, kernel in kernels_of_steps.items():
        values = triton._step_constants(16, chunk_of(architecture, dtype), True, True, blocks)
        fits(kernel, architecture, dtype, values, (triton.WARPS, 1, None), tmp_path)
