"""Collinear attention through the best softmax attention there is: no score matrix of its own."""

from typing import Any

from torch import Tensor

from farspan.ops.collinear.reference import collinear_key, collinear_query
from farspan.ops.softmax.api import softmax_attention


def collinear_attention_fused(
    q: Tensor, t: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, form: str, tie: str, scale: float, **visibility: Any
) -> Tensor:
    """See `collinear_attention`."""
    query = collinear_query(q, cos, sin, form=form, scale=scale)
    key = collinear_key(t, cos, sin, form=form, tie=tie)
    return softmax_attention(query, key, v, scale=1.0, **visibility)
