"""The launch of state space duality's decoding step."""

import torch
import triton
from torch import Tensor

from farspan.ops._launch_step import dense_rows, step_warps
from farspan.ops.ssd.step_kernels import step_kernel


def state_space_step_triton(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    state: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """The kernel's form of `state_space_step`; arguments as there."""
    rows, _, heads, values = x.shape
    groups, width = b.shape[2:]
    x, b, c = (dense_rows(stream) for stream in (x, b, c))
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    out = torch.empty((rows, 1, heads, values), dtype=x.dtype, device=x.device)
    block_k, block_v = triton.next_power_of_2(width), triton.next_power_of_2(values)
    step_kernel[(rows, heads)](
        x,
        dt,
        a.contiguous(),
        b,
        c,
        out if d is None else d,  # what is not there is never read
        out if dt_bias is None else dt_bias,
        out if cos is None else cos.contiguous(),
        out if sin is None else sin.contiguous(),
        state,
        out,
        float(dt_limit[0]),
        float(dt_limit[1]),
        x.stride(0),
        dt.stride(0),
        b.stride(0),
        c.stride(0),
        H=heads,
        G=groups,
        K=width,
        V=values,
        R=0 if cos is None else 2 * cos.shape[-1],
        BK=block_k,
        BV=block_v,
        BIASED=dt_bias is not None,
        SOFTPLUS=dt_softplus,
        SKIP=d is not None,
        num_warps=step_warps(block_k, block_v),
    )
    return out
