"""The short convolution as a sum over its taps: the definition that the faster form is tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype


def short_convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `act(bias + sum_j weight[:, j] x_{t-W+1+j})`, each document after its own state or zeros.

    Args:
        x: `[B, T, D]`.
        weight: `[D, W]`.
        bias: `[D]` or None.
        activation: `"silu"` or None.
        initial_state: `[B, D, W]` (`[num_seqs, D, W]` when packed) or None.
        cu_seqlens: `[num_seqs + 1]` int32 or None.

    Returns:
        `out` `[B, T, D]` in x's dtype, and the last W inputs `[B, D, W]` (`[num_seqs, D, W]`) in x's dtype.
    """
    dtype = compute_dtype(x, weight)
    taps = weight.shape[1]
    if cu_seqlens is None:
        documents = list(x.unbind(0))
    else:
        documents = [x[0, start:end] for start, end in varlen.spans(cu_seqlens)]
    outs, states = [], []
    for index, document in enumerate(documents):
        past = x.new_zeros(taps, x.shape[-1]) if initial_state is None else initial_state[index].T.to(x.dtype)
        inputs = torch.cat([past, document])
        windows = inputs.unfold(0, taps, 1)[1:].to(dtype)  # [T, D, W]
        out = (windows * weight.to(dtype)).sum(-1)
        if bias is not None:
            out = out + bias.to(dtype)
        outs.append(F.silu(out) if activation == "silu" else out)
        states.append(inputs[inputs.shape[0] - taps :].T)
    state = torch.stack(states) if states else x.new_zeros(0, x.shape[-1], taps)
    if cu_seqlens is None:
        out = torch.stack(outs) if outs else torch.zeros_like(x, dtype=dtype)
    else:
        out = torch.cat(outs).unsqueeze(0) if outs else torch.zeros_like(x, dtype=dtype)
    return out.to(x.dtype), state
