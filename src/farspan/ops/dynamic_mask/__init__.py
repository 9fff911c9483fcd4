"""Dynamic mask attention: softmax attention with a learned bias per key and a selection of keys by that bias."""
