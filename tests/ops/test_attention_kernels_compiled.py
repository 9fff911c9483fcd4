"""The kernels of the attention-like operators compile ahead of time, without a GPU, and stay in registers."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from farspan.ops import rotary_kernels as rotary
from farspan.ops.collinear import kernels as collinear
from farspan.ops.dilated import boxes
from farspan.ops.dilated import kernels as dilated
from farspan.ops.dilated import rotation_kernels as turns
from farspan.ops.dilated import rows_kernels as rows
from farspan.ops.dynamic_mask import expiry_kernels
from farspan.ops.dynamic_mask import kernels as lanes
from farspan.ops.dynamic_mask import triton as dynamic_mask
from farspan.ops.experts import kernels as experts
from farspan.ops.experts import routing_kernels as routing
from farspan.ops.experts import triton as bag_tiles
from tests.ops.test_kernels_compiled import serialised, stack_bytes

pytestmark = pytest.mark.slow

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
SPILLED_BYTES = 128
# Sums that are rescaled or wait in registers come between the products of two steps, which run one after the other.
APART = {f"{form}{name}" for form in ("", "limited ", "wide ") for name in ("attend", "query gradient")}
APART |= {"wide lane gradient"}
# Tiles of dynamic mask before Hopper, where they differ.
OLDER = {"wide attend": {"QB": 1}, "wide query gradient": {"QB": 1, "TURNED": True}}
FLOAT32 = {"lses", "total", "base_lse", "cos", "sin", "bias", "lse", "delta", "dk", "dv", "d_bias", "line", "sums"}
FLOAT32 |= {"hidden", "coefficients", "weights", "d_hidden", "d_weights", "sums", "factors"}
FLOAT32 |= {"to_q", "to_k", "to_v", "firsts"}
TABLES = {"table", "boxes", "expires", "limits", "ranks", "windows", "ends", "starts", "before", "places", "patterns"}
NUMBERS = {
    "R",
    "keep",
    "first_row",
    "blocks",
    "W",
    "U",
    "first",
    "end",
    "tokens",
    "width",
    "rows",
    "B",
    "T",
    "S",
    "H",
    "G",
    "E",
    "P",
    "candidates",
}
NUMBERS |= {"N", "pieces", "x_row", "y_row", "K", "P", "candidates", "dilation", "reach", "count", "lowest", "window"}
LONG = {"order", "ids", "begins", "offsets"}
BOXES = {"D": 64, "BT": 64, "BD": 64, "NUMBERS": boxes.NUMBERS, "WORD": boxes.WORD}
TURNED = {"K": 64, "R": 32, "HEAD": False, "BT": 32, "BK": 64}
ROTATED = {"K": 64, "R": 32, "BT": 16, "HB": 4, "BK": 64}
BAGS = {"ACT": "silu", "PARTS": 2, "STRETCH": 32, "PIECE": 256, "TABLES": True}
RANKED = {"BP": 128, "BA": 64, "BC": 512, "BK": 64}
TILES = {"D": 64, "V": 64, "BD": 64, "BV": 64, "C": 64, "QB": 2, "DOT": tl.bfloat16, "PRECISION": "ieee"}
TILES |= {"BN": 64, "BL": 64, "LIMITED": False, "EXACT": True, "TURNED": False}
WIDE = {"D": 128, "V": 128, "BD": 128, "BV": 128}
# Exact products of float32 leave registers for fewer queries and keys.
EXACT_TILES = TILES | {"C": 32, "BN": 32, "BL": 32, "QB": 1, "EXACT": False, "TURNED": True}
EXACT_TILES |= {"DOT": tl.float32, "PRECISION": "tf32x3"}
WIDE_EXACT_TILES = EXACT_TILES | WIDE | {"C": 16, "BN": 16, "BL": 16}
ROWS = {"K": 64, "V": 64, "BK": 64, "BV": 64, "BM": 64, "BN": 64, "CAUSAL": True, "BIAS": True, "PRECISION": "ieee"}
WIDE_ROWS = ROWS | {"K": 128, "V": 128, "BK": 128, "BV": 128}


def bags(kernel: Any, tile: tuple[int, ...], **changed: Any) -> tuple[Any, dict[str, Any], int, int, bool]:
    """A kernel of retrieved experts of 1024 channels."""
    constants = bag_tiles._constants(kernel, tile, 1024, *(BAGS | changed).items())
    return kernel, dict(constants), tile[2], tile[3], False


# Kernel, compile-time arguments, warps, stages, whether it multiplies matrices.
KERNELS: dict[str, tuple[Any, dict[str, Any], int, int, bool]] = {
    "merge boxes": (dilated.merge_kernel, BOXES | {"BASE": True}, 4, 3, False),
    "sum boxes": (dilated.sum_kernel, BOXES, 4, 3, False),
    "first rows": (dilated.first_rows_kernel, {"D": 64, "BD": 64, "ROWS": 32}, 4, 1, False),
    "wide first rows": (dilated.first_rows_kernel, {"D": 128, "BD": 128, "ROWS": 32}, 8, 1, False),
    "rows": (rows.attend_kernel, ROWS | {"BM": 128, "EXACT": True}, 8, 2, True),
    "wide rows": (rows.attend_kernel, WIDE_ROWS | {"BM": 128, "BN": 32, "EXACT": True}, 8, 2, True),
    "rows query gradient": (rows.query_gradient_kernel, ROWS, 4, 2, True),
    "wide rows query gradient": (rows.query_gradient_kernel, WIDE_ROWS, 8, 2, True),
    "rows key gradient": (rows.key_gradient_kernel, ROWS, 4, 2, True),
    "wide rows key gradient": (rows.key_gradient_kernel, WIDE_ROWS, 8, 2, True),
    "rows bias gradient": (rows.bias_gradient_kernel, ROWS, 8, 1, True),
    "wide rows bias gradient": (rows.bias_gradient_kernel, WIDE_ROWS | {"BM": 32}, 4, 1, False),
    "transform": (collinear.transform_kernel, TURNED | {"STRICT": False, "HB": 4}, 4, 3, False),
    "strict transform": (collinear.transform_kernel, TURNED | {"STRICT": True, "HB": 4}, 4, 3, False),
    "transform gradient": (collinear.transform_gradient_kernel, TURNED | {"STRICT": False, "HB": 4}, 4, 3, False),
    "strict transform gradient": (collinear.transform_gradient_kernel, TURNED | {"STRICT": True, "HB": 4}, 4, 3, False),
    "turn": (turns.turn_kernel, {"K": 64, "BACK": True, "BT": 32, "HB": 4, "BK": 64}, 4, 1, False),
    "rotation": (rotary.rotate_kernel, ROTATED | {"INTERLEAVED": False, "BACK": True}, 4, 3, False),
    "interleaved rotation": (rotary.rotate_kernel, ROTATED | {"INTERLEAVED": True, "BACK": False}, 4, 3, False),
    "coefficients": (collinear.coefficient_kernel, TURNED, 4, 3, False),
    "coefficients gradient": (collinear.coefficient_gradient_kernel, TURNED, 4, 3, False),
    "window": (expiry_kernels.window_kernel, {"N": 64, "BX": 1024, "PACKED": False}, 4, 3, False),
    "expiry": (expiry_kernels.expiry_kernel, {"N": 64, "PACKED": True}, 4, 3, False),
    "dots": bags(experts.dots_kernel, bag_tiles.DOTS),
    "mix": bags(experts.mix_kernel, bag_tiles.MIX),
    "expert gradient": bags(experts.gradient_kernel, bag_tiles.GRADIENT),
    "frozen expert gradient": bags(experts.gradient_kernel, bag_tiles.GRADIENT, TABLES=False),
    "join experts": bags(experts.join_kernel, bag_tiles.JOIN),
    "product keys": (routing.topk_kernel, RANKED | {"WIDE": False}, 1, 3, False),
    "float32 product keys": (routing.topk_kernel, RANKED | {"WIDE": True}, 1, 3, False),
    "a million product keys": (routing.topk_kernel, RANKED | {"WIDE": False, "BP": 1024}, 4, 3, False),
    "spread": (routing.spread_kernel, RANKED, 1, 3, False),
    "link": (expiry_kernels.link_kernel, {"BX": 1024}, 4, 3, False),
    "hop": (expiry_kernels.hop_kernel, {"BX": 1024}, 4, 3, False),
    "birth": (expiry_kernels.birth_kernel, {"C": 64, "BX": 1024}, 4, 3, False),
    "newest": (expiry_kernels.newest_kernel, {"BM": 32, "BL": 64}, 4, 3, False),
    "attend": (lanes.attend_kernel, TILES, 4, 3, True),
    "query gradient": (lanes.query_gradient_kernel, TILES, 4, 2, True),
    "own gradient": (lanes.own_gradient_kernel, TILES | {"QB": 1}, 4, 1, True),
    "lane gradient": (lanes.lane_gradient_kernel, TILES | {"QB": 1}, 4, 1, True),
    "limited attend": (lanes.attend_kernel, TILES | {"LIMITED": True}, 4, 3, True),
    "limited query gradient": (lanes.query_gradient_kernel, TILES | {"LIMITED": True}, 4, 2, True),
    "limited own gradient": (lanes.own_gradient_kernel, TILES | {"QB": 1, "LIMITED": True}, 4, 1, True),
    "limited lane gradient": (lanes.lane_gradient_kernel, TILES | {"QB": 1, "LIMITED": True}, 4, 1, True),
    "wide attend": (lanes.attend_kernel, TILES | WIDE, 8, 3, True),
    "wide query gradient": (lanes.query_gradient_kernel, TILES | WIDE, 8, 2, True),
    "wide own gradient": (lanes.own_gradient_kernel, TILES | WIDE | {"QB": 1}, 8, 1, True),
    "wide lane gradient": (lanes.lane_gradient_kernel, TILES | WIDE | {"QB": 1}, 8, 1, True),
}
for wide, tiles in (("", EXACT_TILES), ("wide ", WIDE_EXACT_TILES), ("limited ", EXACT_TILES | {"LIMITED": True})):
    KERNELS |= {
        f"{wide}float32 attend": (lanes.attend_kernel, tiles, 4, 3, False),
        f"{wide}float32 query gradient": (lanes.query_gradient_kernel, tiles, 4, 2, False),
        f"{wide}float32 own gradient": (lanes.own_gradient_kernel, tiles, 4, 1, False),
        f"{wide}float32 lane gradient": (lanes.lane_gradient_kernel, tiles, 4, 1, False),
    }


def kind(name: str, wide: bool) -> Any:
    """The type of an argument by its name, of operands in float32 if `wide`; lists of tensors hold three."""
    if name in NUMBERS:
        return "i32"
    if name in ("scale", "plain_scale"):
        return "fp32"
    if name in LONG:
        return "*i64"
    element = "*i32" if name in TABLES else "*fp32" if wide or name in FLOAT32 else "*bf16"
    return (element,) * 3 if name in ("outs", "lses", "parts") else element


def compiled(kernel: Any, values: dict[str, Any], architecture: int, warps: int, stages: int) -> Any:
    names, wide = [parameter.name for parameter in kernel.params], values.get("DOT") == tl.float32
    signature = {name: "constexpr" if name in values else kind(name, wide) for name in names}
    if kernel.__module__ == rows.__name__ and "table" in names:
        signature["table"] = "*i64"
    pointers = [i for i, name in enumerate(names) if str(signature[name]).startswith("*")]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=values,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": warps, "num_stages": stages})


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles(name: str, architecture: int, tmp_path: Path) -> None:
    kernel, values, warps, stages, multiplies = KERNELS[name]
    if "STRICT" not in values and "HEAD" not in values:
        values = {key: value for key, value in values.items() if key in kernel.arg_names}
    if architecture == 80 and kernel.__module__ == lanes.__name__:
        values = values | OLDER.get(name, {})
    if kernel.__module__ == lanes.__name__ and "float32" not in name and (architecture == 80) != ("wide" in name):
        schedules = dynamic_mask.OLDER if architecture == 80 else dynamic_mask.WIDER
        warps, stages = schedules.get(kernel.__name__, (warps, stages))
    binary = compiled(kernel, values, architecture, warps, stages)
    assert binary.metadata.shared <= SHARED_MEMORY[architecture], f"{binary.metadata.shared} bytes shared"
    assert stack_bytes(binary, tmp_path) <= SPILLED_BYTES
    if multiplies and architecture == 90:
        assert "wgmma.mma_async" in binary.asm["ptx"], "no warp-group matrix instruction"
        assert not serialised(binary, tmp_path) or name in APART, "products are serialised"
