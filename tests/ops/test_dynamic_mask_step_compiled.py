"""The kernels of dynamic mask attention's decoding step, and of norms with rotation, compile without a GPU."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from farspan.ops.dynamic_mask.scores_triton import scores_kernel
from farspan.ops.dynamic_mask.step_kernels import live_kernel, take_in_kernel
from farspan.ops.rotary_norm_kernels import normed_gradient_kernel, normed_kernel

pytestmark = pytest.mark.slow

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
KINDS = dict.fromkeys(
    ("p_bias", "p_ranking", "p_cos", "p_sin", "p_biases", "p_rankings", "p_parts", "p_stats"), "*fp32"
)
KINDS |= {"p_born": "*i32", "p_seen": "*i32", "p_weight": "*fp64", "p_offset": "*fp64", "scale": "fp32", "eps": "fp32"}
KINDS |= dict.fromkeys(("q", "k", "q_norm", "k_norm", "q_out", "k_out", "dq_out", "dk_out", "dq", "dk"), "*bf16")
KINDS |= dict.fromkeys(("cos", "sin", "dq_norm", "dk_norm"), "*fp32")
NARROW = {"G": 8, "SHARED": 2, "K": 64, "V": 64, "R": 64, "NORMED": True, "BK": 64, "BV": 64}
WIDE = {"G": 8, "SHARED": 1, "K": 128, "V": 128, "R": 128, "NORMED": True, "BK": 128, "BV": 128}
TILES = {"Q": 2, "QB": 16, "DOT": tl.bfloat16, "PRECISION": "ieee"}
ROW = {"D": 1024, "BT": 1, "BD": 1024, "HEADS": 1, "BM": 1, "OFFSET": True, "EXPONENTIAL": True, "LARGEST": 80.0}
TURNED = {"K": 128, "INTERLEAVED": False, "BT": 16, "HB": 4, "BK": 128}
KERNELS = {
    "take in": (take_in_kernel, NARROW | {"BR": 2, "BS": 1024}),
    "wide take in": (take_in_kernel, WIDE | {"BR": 1, "BS": 2048}),
    "take in for many": (take_in_kernel, WIDE | {"SHARED": 16, "BR": 16, "BS": 128}),
    "attention": (live_kernel, NARROW | TILES | {"BT": 128}),
    "wide attention": (live_kernel, WIDE | TILES | {"BT": 64}),
    "norm and rotation": (normed_kernel, TURNED),
    "gradient of norm and rotation": (normed_gradient_kernel, TURNED),
    "scores of a step": (scores_kernel, ROW),
    "scores": (scores_kernel, ROW | {"BT": 8, "BD": 128, "HEADS": 8, "BM": 8}),
}


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles(name: str, architecture: int, tmp_path: Path) -> None:
    kernel, values = KERNELS[name]
    names = [parameter.name for parameter in kernel.params]
    kinds = {x: "constexpr" if x in values else KINDS.get(x, "*bf16" if x.startswith("p_") else "i32") for x in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature=kinds, constexprs=values, attrs=aligned)
    binary = compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": 4, "num_stages": 2})
    assert binary.metadata.shared <= SHARED_MEMORY[architecture]
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", report).group(1)) <= 128
