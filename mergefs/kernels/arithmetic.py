"""Fused multiply-add, rounded once, the same on every CPU.

torch contracts ``a + x * w`` to one instruction where the CPU has it, so that is what a weighted average is defined
by here. numpy has no such operation; it is emulated exactly (Boldo and Melquiond 2008, "Emulation of FMA and correctly
rounded sums: proved algorithms using rounding to odd").
"""

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.precision import Array

_SPLITTER = np.float64(2**27 + 1)


def fused_multiply_add(values: Array, factor: float | Array, addend: Array) -> Array:
    """Return ``values * factor + addend`` with a single rounding; all three are float32, or all float64.

    The result has the shape of ``addend``; the others have it, too, or are broadcast to it. In float64 a product beyond
    2**900, or below 2**-900, may be rounded on its own first.
    """
    if values.dtype == np.float64:
        return _fused_float64(values.astype(np.float64), np.asarray(factor, np.float64), addend.astype(np.float64))
    # The product of two float32 is exact in float64; its sum with the addend, rounded to odd, rounds right to float32.
    product = values.astype(np.float64) * np.asarray(factor, np.float32).astype(np.float64)
    return _add_to_odd(product, addend.astype(np.float64)).astype(np.float32)


def _fused_float64(values: NDArray[np.float64], factor: NDArray[np.float64], addend: NDArray[np.float64]) -> Array:
    """Return the float64 result from exact sums and products of halves."""
    high, low = _two_product(values, factor)
    carried, carried_error = _two_sum(addend, low)
    total, total_error = _two_sum(high, carried)
    fused = total + _add_to_odd(carried_error, total_error)
    # Halves overflow, infinities and NaN have no error terms, zeros lose their sign: the plain result is right there.
    plain = values * factor + addend
    return np.where(np.isfinite(fused) & (fused != 0), fused, plain)


def _two_sum(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the rounded sum and what the rounding left (Knuth)."""
    total = first + second
    virtual = total - first
    return total, (first - (total - virtual)) + (second - virtual)


def _two_product(
    values: NDArray[np.float64], factor: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the rounded product and what the rounding left (Dekker)."""
    product = values * factor
    scaled = values * _SPLITTER
    high = scaled - (scaled - values)
    low = values - high
    factor_high = factor * _SPLITTER - (factor * _SPLITTER - factor)
    factor_low = factor - factor_high
    error = ((high * factor_high - product) + high * factor_low + low * factor_high) + low * factor_low
    return product, error


def _add_to_odd(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum rounded to odd: towards the neighbour with an odd last bit unless it is exact."""
    total, error = _two_sum(first, second)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(error) & ((bits & 1) == 0)
    outward = (error > 0) == (total > 0)
    odd: NDArray[np.float64] = np.where(inexact, np.where(outward, bits + 1, bits - 1), bits).view(np.float64)
    return odd
