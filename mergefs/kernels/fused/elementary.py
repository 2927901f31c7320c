"""Exponentials and logarithms in float64: the steps of ``mergefs.kernels.elementary``, for loops that vectorise.

They are for results that are rounded to float32, where nothing is left of what numpy's version does beyond its range.
"""

import math
from typing import Any

import numpy as np

from mergefs.kernels.elementary import (
    EXPONENTIAL_COEFFICIENTS,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    LOGARITHM_COEFFICIENTS,
)
from mergefs.kernels.fused.compilation import inlined
from mergefs.kernels.fused.values import bits_of_double, double_of_bits

_TO_WHOLE = np.float64(1.5 * 2.0**52)
"""Added and subtracted again it rounds to the nearest whole number, ties to even."""

_LARGEST_POWER = np.float64(690)  # e to it is beyond float32, and has an exponent of float64
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float64(LOG2_E), np.float64(LN2_HIGH), np.float64(LN2_LOW)
_HALF_ROOT = np.float64(math.sqrt(0.5))
_ZERO, _ONE, _TWO = np.float64(0), np.float64(1), np.float64(2)
_INFINITY, _NAN = np.float64(np.inf), np.float64(np.nan)
_BIAS, _DIGITS = np.int64(1023), np.int64(52)
_MANTISSA = np.int64((1 << 52) - 1)
_HALF = np.int64(1022 << 52)


@inlined
def exponential(value: Any) -> Any:
    """Return e to the power of a float64."""
    power = min(max(value, -_LARGEST_POWER), _LARGEST_POWER) if value == value else _ZERO
    doublings = (power * _LOG2_E + _TO_WHOLE) - _TO_WHOLE
    rest = power - doublings * _LN2_HIGH
    rest = rest - doublings * _LN2_LOW
    result = np.float64(EXPONENTIAL_COEFFICIENTS[0])
    for term in range(1, len(EXPONENTIAL_COEFFICIENTS)):
        result = result * rest + EXPONENTIAL_COEFFICIENTS[term]
    scaled = result * double_of_bits((np.int64(doublings) + _BIAS) << _DIGITS)
    return scaled if value == value else _NAN


@inlined
def logarithm(value: Any) -> Any:
    """Return the natural logarithm of a float64 that is no smaller than a float32 can be."""
    bits = bits_of_double(value)
    mantissa = double_of_bits((bits & _MANTISSA) | _HALF)
    exponent = ((bits >> _DIGITS) & np.int64(0x7FF)) - (_BIAS - np.int64(1))
    is_small = mantissa < _HALF_ROOT
    mantissa = mantissa * _TWO if is_small else mantissa
    doublings = np.float64(exponent - np.int64(is_small))
    ratio = (mantissa - _ONE) / (mantissa + _ONE)
    square = ratio * ratio
    series = np.float64(LOGARITHM_COEFFICIENTS[0])
    for term in range(1, len(LOGARITHM_COEFFICIENTS)):
        series = series * square + LOGARITHM_COEFFICIENTS[term]
    series = series * square
    twice = _TWO * ratio
    result = doublings * _LN2_HIGH + (twice + (twice * series + doublings * _LN2_LOW))
    result = result if value > _ZERO else (-_INFINITY if value == _ZERO else _NAN)
    return _INFINITY if value == _INFINITY else result
