"""Every kernel compiles for the architectures of the tile table, ahead of time, without a GPU.

This catches what the interpreter lets pass: operations that the compiler does not have, matrix products that are too
small, shared memory beyond the card's, registers spilled in bulk, matrix instructions that are missing.
"""

import os
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from farspan.ops.gated_linear import chunk_kernels, extreme_kernels, kernels
from farspan.ops.gated_linear.launches import CHUNK, LIMIT, ROW_NUMBERS
from farspan.ops.gated_linear.tiles import NARROWEST, Tiles, tiles, whole
from farspan.ops.metala.triton import LARGEST_VALUE_WIDTH

pytestmark = pytest.mark.slow

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
SPILLED_BYTES = 128
CASES = [*product([torch.bfloat16], [64, 128], [1, 2, 3]), *product([torch.float32], [64, 128], [1, 3])]
INTEGERS, FLOATS = {"rows", "count", "H", "R"}, {"scale", "tau", "eps", "low", "high"}
TABLES = {"segments", "chunks", "offsets"}
ALWAYS_FLOAT32 = {
    "start", "end", "lost", "added", "initial", "final", "centre", "half", "u", "du", "rstd", "d_weight", "a", "b",
    "log_count", "own_scale", "parts", "x_scale", "y_scale", "q_scale", "k_scale", "step", "total", "asked", "kept",
    "dw", "net", "left", "skipped",
}  # fmt: skip


def constants(dtype: torch.dtype, width: int, decay: int) -> dict[str, Any]:
    """Compile-time arguments that the kernels share."""
    fast = 0 if dtype == torch.float32 else 2
    return {
        "K": width, "V": 128, "BT": CHUNK, "BK": max(NARROWEST, width), "DECAY": decay, "LIMIT": LIMIT[dtype],
        "AUGMENT": decay == 3, "INSIDE": True, "NORMALIZE": decay == 3,
        "FAST": fast, "PART": tl.bfloat16, "DOT": tl.bfloat16 if fast else tl.float32,
        "PRECISION": "tf32" if fast else "tf32x3", "HAS_START": True, "STORE_STATES": True, "STORE_END": True,
        "STORE_LOST": True, "KEPT": False, "BLOCKS": 2, "BN": 256,
    }  # fmt: skip


def compiled(
    kernel: Any,
    architecture: int,
    dtype: torch.dtype,
    values: dict[str, Any],
    warps: int,
    stages: int,
    registers: int | None,
) -> Any:
    """The kernel's binary for an architecture such as 90."""
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    names = [parameter.name for parameter in kernel.params]
    signature = {}
    for name in names:
        if name in values:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "*i32" if name in TABLES else "*fp32" if name in ALWAYS_FLOAT32 else element
            if name in ("total", "centre", "half") and dtype == torch.float32:
                signature[name] = "*fp64"
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    known = {name: values[name] for name in names if name in values}
    source = ASTSource(kernel, signature=signature, constexprs=known, attrs=attributes)
    return compile(
        source, GPUTarget("cuda", architecture, 32), {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    )


def stack_bytes(binary: Any, directory: Path) -> int:
    """Bytes per thread that did not fit the registers."""
    from triton import knobs

    path = directory / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report).group(1))


def of_rows(
    choice: Tiles, values: int, normalized: bool
) -> list[tuple[Any, tuple[int, int, int | None], dict[str, Any]]]:
    """The `launches` that hold rows of so many values, whole where they are normalised."""
    columns, *schedule = whole(choice.output, values) if normalized else choice.output
    output = {"BV": min(columns, values)}
    return [
        (chunk_kernels.output_kernel, tuple(schedule), output),
        (chunk_kernels.row_kernel, (4, 1, None), {"BV": values, "BR": ROW_NUMBERS // values}),
        (extreme_kernels.extreme_output_kernel, (8, 1, None), output | {"BK": NARROWEST}),
    ]


def launches(
    choice: Tiles, own: Tiles, normalized: bool
) -> list[tuple[Any, tuple[int, int, int | None], dict[str, Any]]]:
    """Kernel, its warps, stages and registers, and the arguments that differ from launch to launch.

    `own` are the tiles of as many channels that decay by themselves as a program takes.
    """
    state, _, gradient, prepare, kept = ({"BV": min(t[0], 128)} for t in choice)
    return [
        (kernels.prepare_kernel, choice.prepare[1:], prepare),
        (
            kernels.state_kernel,
            choice.state[1:],
            state | {"REVERSE": False, "STORE_VALUES": False, "STAGES": choice.state[2]},
        ),
        (
            kernels.state_kernel,
            choice.state[1:],
            state | {"REVERSE": True, "STORE_VALUES": True, "STAGES": choice.state[2]},
        ),
        (
            kernels.state_kernel,
            choice.kept[1:],
            kept | {"REVERSE": True, "STORE_VALUES": True, "KEPT": True, "STAGES": choice.kept[2]},
        ),
        (kernels.scan_kernel, (2, 1, None), {"REVERSE": False}),
        (chunk_kernels.gradient_kernel, own.gradient[1:], {"BV": own.gradient[0], "BK": NARROWEST}),
        (extreme_kernels.extreme_gradient_kernel, (8, 1, None), gradient | {"BK": NARROWEST}),
        *of_rows(choice, 128, normalized),
    ]


def fits(
    kernel: Any,
    architecture: int,
    dtype: torch.dtype,
    values: dict[str, Any],
    options: tuple[int, int, int | None],
    directory: Path,
) -> None:
    """Whether a kernel compiles with the card's shared memory, registers and matrix instructions."""
    name, binary = kernel.__name__, compiled(kernel, architecture, dtype, values, *options)
    assert binary.metadata.shared <= SHARED_MEMORY[architecture], f"{name}: {binary.metadata.shared} bytes shared"
    if architecture == 90 and dtype == torch.bfloat16 and name not in ("scan_kernel", "row_kernel"):
        assert "wgmma.mma_async" in binary.asm["ptx"], f"{name}: no warp-group matrix instruction"
    if dtype == torch.bfloat16:
        assert stack_bytes(binary, directory) <= SPILLED_BYTES, name


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("dtype", "width", "decay"), CASES, ids=str)
def test_kernels_compile(architecture: int, dtype: torch.dtype, width: int, decay: int, tmp_path: Path) -> None:
    choice, own = (tiles(architecture // 10, channels, dtype.itemsize) for channels in (width, NARROWEST))
    for kernel, options, differing in launches(choice, own, decay == 3):
        fits(kernel, architecture, dtype, constants(dtype, width, decay) | differing, options, tmp_path)


@pytest.mark.parametrize(("architecture", "width"), [(80, 128), (90, 64), (90, 128)])
def test_kernels_of_rows_of_many_values_compile(architecture: int, width: int, tmp_path: Path) -> None:
    dtype, values = torch.bfloat16, LARGEST_VALUE_WIDTH[2]
    for kernel, options, differing in of_rows(tiles(architecture // 10, width, dtype.itemsize), values, True):
        fits(kernel, architecture, dtype, constants(dtype, width, 3) | {"V": values} | differing, options, tmp_path)
