"""Tolerances of the tests, with their reasons. Errors are relative to the largest entry of what is expected.

A tolerance is never loosened to make a test pass: a new reason needs a new name.
"""

# The same sum in another order, float64: rounding is 1e-16 times the number of terms, growth of sums included.
FLOAT64 = 1e-10
# The same sum in another order, float32: rounding is 6e-8, exponents up to 60 carry 4e-6, sums over some hundred terms.
FLOAT32 = 1e-4
# A decoding step against the whole sequence in float32: a handful of terms.
FLOAT32_STEP = 5e-6
# Inputs and outputs in bfloat16 (8 bits of mantissa), accumulated in float32: one rounding of the output.
BFLOAT16 = 1e-2
# Finite differences of torch.autograd.gradcheck in float64.
GRADCHECK = 1e-6
