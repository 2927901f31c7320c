"""Arithmetic on blocks: rounding to the compute dtype, random masks, and the kernels of the methods."""
