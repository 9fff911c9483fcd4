"""SiLU of one stream times another, of the slices of one product, while text is generated."""
