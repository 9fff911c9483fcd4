"""The launch of cosine attention's decoding step."""

import torch
import triton
from torch import Tensor

from farspan.ops._launch_step import dense_rows, step_warps
from farspan.ops.cosine.step import Call
from farspan.ops.cosine.step_kernels import step_kernel


def cosine_step_triton(
    q: Tensor, k: Tensor, v: Tensor, exponent: Tensor | None, state: Tensor, count: Tensor, call: Call
) -> Tensor:
    """The kernel's form of `cosine_step`; arguments as there."""
    rows, _, heads, width = q.shape
    values = v.shape[-1]
    q, k, v = (dense_rows(x) for x in (q, k, v))
    out = torch.empty((rows, 1, heads, values), dtype=v.dtype, device=v.device)
    block_k, block_v = triton.next_power_of_2(width), triton.next_power_of_2(values)
    step_kernel[(rows, heads)](
        q,
        k,
        v,
        out if exponent is None else exponent.contiguous(),  # what is not there is never read
        count.contiguous(),
        out if call.cos is None else call.cos.contiguous(),
        out if call.sin is None else call.sin.contiguous(),
        state,
        out,
        float(call.eps),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        H=heads,
        K=width,
        V=values,
        R=0 if call.cos is None else 2 * call.cos.shape[-1],
        BK=block_k,
        BV=block_v,
        INTERLEAVED=call.interleaved,
        COUNTED=exponent is not None,
        BY_QUERY=call.by_query,
        num_warps=step_warps(block_k, block_v),
    )
    return out
