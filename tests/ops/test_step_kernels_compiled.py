"""The decoding steps compile ahead of time, within registers and shared memory, without a GPU."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from farspan.ops._launch_step import step_warps
from farspan.ops.collinear.step_kernels import collinear_kernel, collinear_lanes_kernel
from farspan.ops.cosine.step_kernels import step_kernel as cosine
from farspan.ops.cross_entropy.kernels import cross_entropy_kernel
from farspan.ops.cross_entropy.triton import FORMS as CROSS_ENTROPY
from farspan.ops.dilated.step_kernels import live_kernel
from farspan.ops.metala.step_kernels import step_kernel as metala
from farspan.ops.short_convolution import kernels as convolutions
from farspan.ops.short_convolution.step_kernels import step_kernel as convolution
from farspan.ops.short_convolution.triton import _constants as convolution_constants
from farspan.ops.softmax.step_kernels import attend_kernel, merge_kernel
from farspan.ops.softmax.step_triton import BLOCK, lanes
from farspan.ops.ssd.step_kernels import step_kernel as ssd
from farspan.ops.swiglu import kernels as products

pytestmark = pytest.mark.slow

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
SPILLED_BYTES = 128
WHOLE = {
    "p_count": "*i64", "p_positions": "*i64", "p_filled": "*i32", "p_mask": "*u8",
    "p_seen": "*i64", "p_slots": "*i64", "p_heads": "*i64", "p_start": "*i32", "p_sequence": "*i32",
    "p_sums": "*fp32", "p_labels": "*i64", "p_nll": "*fp32",
}  # fmt: skip
FLOATS = {"scale", "rotary_scale", "tau", "eps", "low", "high"}
FLOAT32 = {"p_state", "p_cos", "p_sin", "p_exponent", "p_a", "p_d", "p_bias", "p_w", "p_parts", "p_stats", "p_theta"}
STATE = {"H": 16, "K": 64, "V": 128, "BK": 64, "BV": 128}
TAPS = dict(zip(("biased", "silu", "state", "packed", "even"), (True,) * 5, strict=True))
FLAGS = {"OWN_KEY": False, "AUGMENT": True, "INSIDE": True, "NORMALIZE": True, "GATED": True}
SLOTS = {"G": 4, "Q": 4, "MASKED": True, "QB": 16, "BT": BLOCK, "DOT": tl.bfloat16, "PRECISION": "ieee"}
LANES = {"G": 16, "STRICT": False, "MASKED": True}
LIVE = {"H": 16, "Q": 4, "BIAS": True, "SEGMENTS": (2048, 8192, 32768), "DILATIONS": (1, 4, 12)}
KERNELS = {
    "metala": (metala, STATE | FLAGS),
    "cosine": (cosine, STATE | {"R": 64, "INTERLEAVED": True, "COUNTED": True, "BY_QUERY": False}),
    "ssd": (
        ssd,
        {"H": 16, "K": 128, "V": 64, "BK": 128, "BV": 64, "G": 1, "R": 128}
        | {"BIASED": True, "SOFTPLUS": True, "SKIP": True},
    ),
    "short_convolution": (convolution, {"W": 4, "BW": 4, "BD": 256, "BIASED": True, "SILU": True}),
    "convolution of sequences": (convolutions.convolution_kernel, convolution_constants(4, **TAPS)),
    "gradient of convolution": (convolutions.gradient_kernel, convolution_constants(4, **TAPS, gradient=True)),
    "cross entropy": (cross_entropy_kernel, CROSS_ENTROPY[True, True]),
    "swiglu": (products.swiglu_kernel, {"BF": 512, "EVEN": True}),
    "gradient of swiglu": (products.gradient_kernel, {"BF": 512, "EVEN": True}),
    "softmax": (attend_kernel, SLOTS | {"K": 64, "V": 64, "R": 64, "INTERLEAVED": False, "BK": 64, "BV": 64}),
    "wide softmax": (attend_kernel, SLOTS | {"K": 128, "V": 128, "R": 32, "INTERLEAVED": True, "BK": 128, "BV": 128}),
    "collinear": (collinear_kernel, SLOTS | {"K": 64, "V": 64, "R": 64, "STRICT": False, "BJ": 32, "BV": 64}),
    "wide collinear": (collinear_kernel, SLOTS | {"K": 128, "V": 128, "R": 64, "STRICT": True, "BJ": 64, "BV": 128}),
    "collinear lanes": (collinear_lanes_kernel, LANES | {"K": 64, "V": 64, "R": 64, "BJ": 32, "BV": 64} | lanes(64, 2)),
    "wide collinear lanes": (
        collinear_lanes_kernel,
        LANES | {"K": 128, "V": 128, "R": 64, "BJ": 64, "BV": 128} | lanes(128, 2),
    ),
    "dilated": (live_kernel, LIVE | {"K": 64, "V": 64, "R": 64, "BK": 64, "BV": 64} | lanes(64, 4)),
    "wide dilated": (live_kernel, LIVE | {"K": 128, "V": 128, "R": 0, "BK": 128, "BV": 128} | lanes(128, 4)),
    "merge": (merge_kernel, {"H": 16, "V": 128, "BS": 16, "BV": 128}),
}


def compiled(kernel: Any, values: dict[str, Any], architecture: int, warps: int) -> Any:
    signature = {}
    for name in (parameter.name for parameter in kernel.params):
        if name in values:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif not name.startswith("p_"):
            signature[name] = "i32"
        else:
            kind = WHOLE.get(name, "*fp32" if name in FLOAT32 else "*bf16")
            listed = "SEGMENTS" in values and name in ("p_keys", "p_values")
            signature[name] = (kind,) * 3 if listed else kind
    attributes = {}
    for i, kind in enumerate(signature.values()):
        places = [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
        aligned = str(kind).startswith("*") or isinstance(kind, tuple)
        attributes |= {place: [["tt.divisibility", 16]] for place in (places if aligned else ())}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    return compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": warps})


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("name", KERNELS)
def test_step_compiles(name: str, architecture: int, tmp_path: Path) -> None:
    kernel, values = KERNELS[name]
    warps = step_warps(values["BK"], values["BV"]) if "BK" in values and "BT" not in values else 4
    warps, values = values.get("num_warps", warps), {key: x for key, x in values.items() if key != "num_warps"}
    binary = compiled(kernel, values, architecture, warps)
    assert binary.metadata.shared <= SHARED_MEMORY[architecture]
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", report).group(1)) <= SPILLED_BYTES
