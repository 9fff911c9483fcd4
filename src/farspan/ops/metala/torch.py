"""MetaLA attention in PyTorch operations: the same formulas around the chunked form of gated linear attention."""

from typing import Any

from torch import Tensor

from farspan.ops.gated_linear.torch import gated_linear_attention_chunked, gated_linear_attention_recurrent
from farspan.ops.metala.reference import metala_attention_reference


def metala_attention_chunked(
    q: Tensor, gate_logits: Tensor, v: Tensor, augmentation: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The fast form of `metala_attention`; arguments as there.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state.
    """
    one_token = options["cu_seqlens"] is None and q.shape[1] == 1
    mix = gated_linear_attention_recurrent if one_token else gated_linear_attention_chunked
    return metala_attention_reference(q, gate_logits, v, augmentation, recurrence=mix, **options)
