"""The launches of collinear attention's decoding step."""

import triton
from torch import Tensor

from farspan.ops._launch_step import dense_rows
from farspan.ops.collinear.step_kernels import collinear_kernel, collinear_lanes_kernel
from farspan.ops.softmax.step import Ring
from farspan.ops.softmax.step_triton import WARPS, Split, lanes

# Warps of a program of one query head, which multiplies no matrices.
ALONE_WARPS = 2


def collinear_attention_step_triton(
    q: Tensor,
    t: Tensor,
    v: Tensor,
    ring: Ring,
    positions: Tensor,
    frequencies: Tensor,
    rotary_scale: float,
    form: str,
    scale: float,
) -> Tensor:
    """The kernels' form of `collinear_attention_step`; arguments as there."""
    q, t, v = (dense_rows(x) for x in (q, t, v))
    alone = q.shape[2] == t.shape[2]
    split = Split(q, ring, v.dtype, ALONE_WARPS if alone else WARPS)
    kernel, constants = collinear_kernel, split.constants
    if alone:
        kernel, constants = collinear_lanes_kernel, split.sizes | lanes(v.shape[-1], ALONE_WARPS)
    else:
        constants["QB"] = max(16, 2 * triton.next_power_of_2(constants["Q"]))
    kernel[split.grid](
        q,
        t,
        v,
        positions.contiguous(),
        frequencies.float().contiguous(),
        *split.tensors,
        float(scale),
        float(rotary_scale),
        ring.keys.shape[1],
        split.parts,
        q.stride(0),
        t.stride(0),
        v.stride(0),
        R=2 * len(frequencies),
        STRICT=form == "strict",
        BJ=max(16, triton.next_power_of_2(q.shape[-1] // 2)),
        **constants,
    )
    return split.merge()
