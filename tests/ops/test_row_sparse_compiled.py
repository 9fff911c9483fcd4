"""The kernel of row-sparse AdamW compiles ahead of time, without a GPU and without spilling."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from farspan.training.row_sparse import WIDEST
from farspan.training.row_sparse_kernel import constants, row_adamw_kernel, warps

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("width", [384, 2048, WIDEST])
def test_kernel_compiles(width: int, architecture: int, tmp_path: Path) -> None:
    values = constants((0.9, 0.999), 1e-8, width)
    names = [parameter.name for parameter in row_adamw_kernel.params]
    numbers = dict.fromkeys(("rate", "shrink"), "fp32") | dict.fromkeys(values, "constexpr")
    signature = {name: numbers.get(name, "*fp32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind == "*fp32"}
    source = ASTSource(row_adamw_kernel, signature=signature, constexprs=values, attrs=attributes)
    binary = compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": warps(width)})
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", report).group(1)) == 0
