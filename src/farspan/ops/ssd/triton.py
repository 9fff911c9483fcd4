"""State space duality through the kernels of gated linear attention."""

import functools

from farspan.ops.gated_linear.triton import gated_linear_attention_triton
from farspan.ops.ssd.reference import through

state_space_duality_triton = functools.partial(through, gated_linear_attention_triton)
