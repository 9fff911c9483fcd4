"""The launch of MetaLA's decoding step."""

import torch
import triton
from torch import Tensor

from farspan.ops._launch_step import dense_rows, step_warps
from farspan.ops.metala.step import Call
from farspan.ops.metala.step_kernels import step_kernel


def metala_step_triton(
    q: Tensor, gate_logits: Tensor, v: Tensor, augmentation: Tensor | None, state: Tensor, call: Call
) -> Tensor:
    """The kernel's form of `metala_step`; arguments as there."""
    rows, _, heads, width = q.shape
    values = v.shape[-1]
    q, gate_logits, v = (dense_rows(x) for x in (q, gate_logits, v))
    key, output_gate = (x if x is None else dense_rows(x) for x in (call.key, call.output_gate))
    out = torch.empty((rows, 1, heads, values), dtype=v.dtype, device=v.device)
    some = out  # stands for what is not there; never read
    block_k, block_v = triton.next_power_of_2(width), triton.next_power_of_2(values)
    step_kernel[(rows, heads)](
        q,
        gate_logits,
        some if key is None else key,
        v,
        some if augmentation is None else augmentation.contiguous(),
        some if output_gate is None else output_gate,
        state,
        out,
        float(call.scale),
        float(call.decay_normalizer),
        float(call.norm_eps),
        q.stride(0),
        gate_logits.stride(0),
        0 if key is None else key.stride(0),
        v.stride(0),
        0 if output_gate is None else output_gate.stride(0),
        H=heads,
        K=width,
        V=values,
        BK=block_k,
        BV=block_v,
        OWN_KEY=key is not None,
        AUGMENT=augmentation is not None,
        INSIDE=call.augmentation_inside,
        NORMALIZE=call.normalize,
        GATED=output_gate is not None,
        num_warps=step_warps(block_k, block_v),
    )
    return out
