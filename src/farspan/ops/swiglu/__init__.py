"""SiLU of one stream times another: of whole tensors, or of slices of one product."""
