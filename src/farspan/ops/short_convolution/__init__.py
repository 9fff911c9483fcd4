"""A short causal convolution of every channel by itself, in front of a mixer."""
