"""Dilated attention: one softmax over the keys that several (segment, dilation) patterns select."""
