"""The launch of state space duality's decoding step."""

import torch
import triton
from torch import Tensor

from farspan.ops._launch_step import dense_rows, step_warps
from farspan.ops.ssd.step import Call
from farspan.ops.ssd.step_kernels import step_kernel


def state_space_step_triton(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, call: Call
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
        out if call.d is None else call.d.contiguous(),  # what is not there is never read
        out if call.dt_bias is None else call.dt_bias.contiguous(),
        out if call.cos is None else call.cos.contiguous(),
        out if call.sin is None else call.sin.contiguous(),
        state,
        out,
        float(call.dt_limit[0]),
        float(call.dt_limit[1]),
        x.stride(0),
        dt.stride(0),
        b.stride(0),
        c.stride(0),
        H=heads,
        G=groups,
        K=width,
        V=values,
        R=0 if call.cos is None else 2 * call.cos.shape[-1],
        BK=block_k,
        BV=block_v,
        BIASED=call.dt_bias is not None,
        SOFTPLUS=call.dt_softplus,
        SKIP=call.d is not None,
        num_warps=step_warps(block_k, block_v),
    )
    return out
