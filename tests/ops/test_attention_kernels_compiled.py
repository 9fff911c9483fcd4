"""The kernels of the attention-like operators compile ahead of time, without a GPU, and stay in registers."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from farspan.ops.collinear import kernels as collinear
from farspan.ops.dilated import kernels as dilated

pytestmark = pytest.mark.slow

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
SPILLED_BYTES = 128
FLOAT32 = {"lses", "total", "base_lse", "cos", "sin"}
TABLES = {"table"}
NUMBERS = {"first", "end", "tokens", "rows", "B", "T", "S", "H", "G"}
PERIODS = {"PERIODS": (4096, 8192, 32768), "DILATIONS": (2, 4, 12)}
BOXES = PERIODS | {"D": 64, "BT": 64, "BD": 64, "NUMBERS": 8}
TURNED = {"K": 64, "R": 32, "HEAD": False, "BT": 32, "BK": 64}
# Kernel, compile-time arguments, warps, stages, whether it multiplies matrices.
KERNELS: dict[str, tuple[Any, dict[str, Any], int, int, bool]] = {
    "merge boxes": (dilated.merge_kernel, BOXES | {"BASE": 2048}, 4, 3, False),
    "sum boxes": (dilated.sum_kernel, BOXES, 4, 3, False),
    "transform": (collinear.transform_kernel, TURNED | {"STRICT": False, "HB": 4}, 4, 3, False),
    "strict transform": (collinear.transform_kernel, TURNED | {"STRICT": True, "HB": 4}, 4, 3, False),
    "transform gradient": (collinear.transform_gradient_kernel, TURNED | {"STRICT": False, "HB": 4}, 4, 3, False),
    "strict transform gradient": (collinear.transform_gradient_kernel, TURNED | {"STRICT": True, "HB": 4}, 4, 3, False),
    "coefficients": (collinear.coefficient_kernel, TURNED, 4, 3, False),
    "coefficients gradient": (collinear.coefficient_gradient_kernel, TURNED, 4, 3, False),
}


def kind(name: str) -> Any:
    """The type of an argument by its name; lists of tensors hold three."""
    if name in NUMBERS:
        return "i32"
    if name == "scale":
        return "fp32"
    element = "*i32" if name in TABLES else "*fp32" if name in FLOAT32 else "*bf16"
    return (element,) * 3 if name in ("outs", "lses", "parts") else element


def compiled(kernel: Any, values: dict[str, Any], architecture: int, warps: int, stages: int) -> Any:
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in values else kind(name) for name in names}
    pointers = [i for i, name in enumerate(names) if str(signature[name]).startswith("*")]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=values,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": warps, "num_stages": stages})


def stack_bytes(binary: Any, directory: Path) -> int:
    """Bytes per thread that did not fit the registers."""
    path = directory / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report).group(1))


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles(name: str, architecture: int, tmp_path: Path) -> None:
    kernel, values, warps, stages, multiplies = KERNELS[name]
    binary = compiled(kernel, values, architecture, warps, stages)
    assert binary.metadata.shared <= SHARED_MEMORY[architecture], f"{binary.metadata.shared} bytes shared"
    assert stack_bytes(binary, tmp_path) <= SPILLED_BYTES
    if multiplies and architecture == 90:
        assert "wgmma.mma_async" in binary.asm["ptx"], "no warp-group matrix instruction"
