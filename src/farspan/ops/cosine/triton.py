"""Cosine attention around the kernels of gated linear attention."""

from torch import Tensor

from farspan.ops.cosine.reference import Call
from farspan.ops.cosine.torch import attend
from farspan.ops.gated_linear.triton import gated_linear_attention_triton


def cosine_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """The kernels' form of `cosine_attention`; arguments and results as the reference's.

    Bidirectional calls are two matrix products and need no kernel.
    """
    return attend(gated_linear_attention_triton, q, k, v, initial_state, call)
