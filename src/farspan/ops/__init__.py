"""Operators: pure functions of tensors, each with a readable reference and faster forms behind one signature.

All take the layout `[B, T, H, K]` (sequence before heads), accept packed documents through `cu_seqlens`, keep states
in float32 and choose their backend per call. Operators with a state return `(out, final_state)`.
"""

from farspan.ops._backend import availability
from farspan.ops.collinear.api import collinear_attention, collinear_coefficients
from farspan.ops.cosine.api import cosine_attention
from farspan.ops.dilated.api import dilated_attention
from farspan.ops.dynamic_mask.api import dynamic_mask_attention
from farspan.ops.experts.api import product_key_topk, retrieved_experts
from farspan.ops.gated_linear.api import gated_linear_attention, gated_linear_attention_step
from farspan.ops.metala.api import metala_attention
from farspan.ops.short_convolution.api import short_convolution
from farspan.ops.softmax.api import softmax_attention
from farspan.ops.ssd.api import state_space_duality

__all__ = [
    "availability",
    "collinear_attention",
    "collinear_coefficients",
    "cosine_attention",
    "dilated_attention",
    "dynamic_mask_attention",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "metala_attention",
    "product_key_topk",
    "retrieved_experts",
    "short_convolution",
    "softmax_attention",
    "state_space_duality",
]
