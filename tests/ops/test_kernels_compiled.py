"""Every kernel compiles for the architectures of the tile table, ahead of time, without a GPU.

This catches what the interpreter lets pass: operations that the compiler does not have, matrix products that are too
small, shared memory beyond the card's, registers spilled in bulk, matrix instructions that are missing.
"""

import os
import re
import subprocess
from collections.abc import Mapping
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
from farspan.ops.gated_linear.launches import LIMIT, ROW_NUMBERS, gradient_block
from farspan.ops.gated_linear.tiles import CHUNK, NARROWEST, WIDEST, Tile, Tiles, extreme_gradient, halved, tiles, whole
from farspan.ops.metala.triton import LARGEST_VALUE_WIDTH

pytestmark = pytest.mark.slow

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
SPILLED_BYTES = 128
# What kernels of float32 spill on Hopper, where halved ones, which hardly spill, are slower (docs/speed.md).
SPILLED_FLOAT32 = 3328
# Architecture, dtype and width; wider heads of halved chunks are several.
CASES = [
    (architecture, dtype, width)
    for architecture in (80, 90)
    for dtype in (torch.bfloat16, torch.float32)
    for width in (64, 128)
    if width <= WIDEST // (1 + halved(architecture // 10, dtype.itemsize))
]
INTEGERS, FLOATS = {"rows", "count", "H", "R"}, {"scale", "tau", "eps", "low", "high"}
TABLES = {"segments", "chunks", "offsets"}
ALWAYS_FLOAT32 = {
    "start", "end", "lost", "added", "initial", "final", "centre", "half", "u", "du", "rstd", "d_weight", "a", "b",
    "log_count", "own_scale", "parts", "x_scale", "y_scale", "q_scale", "k_scale", "step", "total", "asked", "kept",
    "dw", "net", "left", "skipped",
}  # fmt: skip


def chunk_of(architecture: int, dtype: torch.dtype) -> int:
    return CHUNK // (1 + halved(architecture // 10, dtype.itemsize))


def constants(dtype: torch.dtype, width: int, decay: int, chunk: int = CHUNK) -> dict[str, Any]:
    """Compile-time arguments that the kernels share."""
    fast = 0 if dtype == torch.float32 else 2
    return {
        "K": width, "V": 128, "BT": chunk, "BK": max(NARROWEST, width),
        "DECAY": decay, "LIMIT": LIMIT[dtype],
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


def serialised(binary: Any, directory: Path) -> bool:
    """Whether the assembler for Hopper keeps products apart that could run beside each other (its warnings C75xx)."""
    from triton import knobs

    path = directory / "kernel.ptx"
    path.write_text(binary.asm["ptx"])
    tool = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas)  # which newer versions take for all cards
    command = [tool.path, "-v", "--gpu-name", "sm_90a", str(path), "-o", os.devnull]
    return "(C75" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


Launch = tuple[Any, tuple[int, int, int | None], dict[str, Any]]


def of_rows(choice: Tiles, values: int, normalized: bool, extreme: bool = True) -> list[Launch]:
    """The `launches` that hold rows of so many values, whole where they are normalised."""
    columns, *schedule = whole(choice.output, values) if normalized else choice.output
    output = {"BV": min(columns, values)}
    chosen: list[Launch] = [
        (chunk_kernels.output_kernel, tuple(schedule), output),
        (chunk_kernels.row_kernel, (4, 1, None), {"BV": values, "BR": ROW_NUMBERS // values}),
    ]
    if extreme:
        chosen.append((extreme_kernels.extreme_output_kernel, (8, 1, None), output | {"BK": NARROWEST}))
    return chosen


def gradients(architecture: int, dtype: torch.dtype, width: int, decay: int, values: int = 128) -> list[Launch]:
    """The `launches` that give gradients, of so many values per head."""
    family, size, padded = architecture // 10, dtype.itemsize, max(NARROWEST, values)
    channels, together = gradient_block(family, size, width, values, decay)
    own = tiles(family, channels, size).gradient
    options = {"BV": min(own[0], padded), "BK": channels, "TOGETHER": together}
    chosen: list[Launch] = [(chunk_kernels.gradient_kernel, own[1:], options)]
    if decay:
        columns, *schedule = extreme_gradient(family)
        options = {"BV": columns, "BK": NARROWEST}
        chosen.append((extreme_kernels.extreme_gradient_kernel, tuple(schedule), options))
    return chosen


def launches(architecture: int, dtype: torch.dtype, width: int, decay: int) -> list[Launch]:
    """Kernel, its warps, stages and registers, and the arguments that differ from launch to launch."""
    choice = tiles(architecture // 10, width, dtype.itemsize)

    def walk(tile: Tile, reverse: bool = False, kept: bool = False) -> Launch:
        forms = {"REVERSE": reverse, "STORE_VALUES": reverse, "KEPT": kept}
        return kernels.state_kernel, tile[1:], {"BV": tile[0], "STAGES": tile[2], **forms}

    chosen = [
        (kernels.prepare_kernel, choice.prepare[1:], {"BV": choice.prepare[0]}),
        walk(choice.state),
        walk(choice.state, True),
        (kernels.scan_kernel, (2, 1, None), {"REVERSE": False}),
        *gradients(architecture, dtype, width, decay),
        *of_rows(choice, 128, decay == 3, decay > 0),
    ]
    if decay:
        chosen.append(walk(choice.kept, True, True))
    return chosen


def fits(
    kernel: Any,
    architecture: int,
    dtype: torch.dtype,
    values: Mapping[str, Any],
    options: tuple[int, int, int | None],
    directory: Path,
    apart: bool = False,
) -> None:
    """Whether a kernel compiles with the card's shared memory, few bytes spilled, and its products by matrix units."""
    name, binary = kernel.__name__, compiled(kernel, architecture, dtype, dict(values), *options)
    assert binary.metadata.shared <= SHARED_MEMORY[architecture], f"{name}: {binary.metadata.shared} bytes shared"
    most = SPILLED_FLOAT32 if architecture == 90 and dtype == torch.float32 else SPILLED_BYTES
    assert stack_bytes(binary, directory) <= most, name
    if "tt.dot" in binary.asm["ttir"]:
        wanted = "wgmma.mma_async" if architecture == 90 and dtype == torch.bfloat16 else r"mma\.(sync|mma_async)"
        assert re.search(wanted, binary.asm["ptx"]), f"{name}: no matrix instruction"
        if "wgmma" in wanted:
            assert not serialised(binary, directory) or apart, f"{name}: products are serialised"


@pytest.mark.parametrize("decay", [0, 1, 2, 3])
@pytest.mark.parametrize(("architecture", "dtype", "width"), CASES, ids=str)
def test_kernels_compile(architecture: int, dtype: torch.dtype, width: int, decay: int, tmp_path: Path) -> None:
    for kernel, options, differing in launches(architecture, dtype, width, decay):
        # The loop over values that keeps the sums of wide heads in registers keeps its products apart.
        apart = kernel is chunk_kernels.gradient_kernel and width > NARROWEST
        values = constants(dtype, width, decay, chunk_of(architecture, dtype)) | differing
        fits(kernel, architecture, dtype, values, options, tmp_path, apart)


@pytest.mark.parametrize(("values", "kept"), [(32, False), (64, False), (64, True), (128, True), (200, False)])
@pytest.mark.parametrize("decay", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("architecture", [80, 90])
def test_gradients_of_few_or_many_values_or_with_a_given_state_compile(
    architecture: int, width: int, decay: int, values: int, kept: bool, tmp_path: Path
) -> None:
    given = {"V": values, "KEPT": kept and decay > 0, "BLOCKS": -(-values // NARROWEST)}
    for kernel, options, differing in gradients(architecture, torch.bfloat16, width, decay, values):
        apart = kernel is chunk_kernels.gradient_kernel and not differing["TOGETHER"]
        numbers = constants(torch.bfloat16, width, decay) | differing | given
        fits(kernel, architecture, torch.bfloat16, numbers, options, tmp_path, apart)


@pytest.mark.parametrize(("architecture", "width"), [(80, 128), (90, 64), (90, 128)])
def test_kernels_of_rows_of_many_values_compile(architecture: int, width: int, tmp_path: Path) -> None:
    dtype, values = torch.bfloat16, LARGEST_VALUE_WIDTH[2]
    for kernel, options, differing in of_rows(tiles(architecture // 10, width, dtype.itemsize), values, True):
        fits(kernel, architecture, dtype, constants(dtype, width, 3) | {"V": values} | differing, options, tmp_path)
