"""State space duality in PyTorch operations, around the chunked form of gated linear attention."""

import functools

from torch import Tensor

from farspan.ops.gated_linear.torch import gated_linear_attention_chunked, gated_linear_attention_recurrent
from farspan.ops.ssd.reference import through


def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    one_token = cu_seqlens is None and q.shape[1] == 1
    mix = gated_linear_attention_recurrent if one_token else gated_linear_attention_chunked
    return mix(q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


state_space_duality_chunked = functools.partial(through, _recurrence)
