"""Sines and cosines of the few numbers that coefficients are made from, exponentials and logarithms of many.

All are taken in float64 and then rounded to float32, so that they are correctly rounded but for one in some hundred
million, which neither torch's nor numpy's own float32 functions are: those depend on the CPU's vectors. The many are
computed from additions and multiplications alone, which every CPU rounds alike.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.precision import Array, Precision


def sine(values: Array, precision: Precision) -> Array:
    """Return the sine of each value, rounded to ``precision``."""
    return _one_by_one(math.sin, values, precision)


def cosine(values: Array, precision: Precision) -> Array:
    """Return the cosine of each value, rounded to ``precision``."""
    return _one_by_one(math.cos, values, precision)


def arc_cosine(values: Array, precision: Precision) -> Array:
    """Return the arc cosine of each value, rounded to ``precision``; NaN outside of [-1, 1]."""
    return _one_by_one(math.acos, values, precision)


def _one_by_one(function: Callable[[float], float], values: Array, precision: Precision) -> Array:
    """Return what ``function`` gives for each value; NaN where it gives nothing."""
    results: Array = np.full(values.shape, np.nan, dtype=precision.carrier)
    for index, value in np.ndenumerate(values):
        try:
            results[index] = function(float(value))
        except ValueError:
            continue
    return precision.round(results)


LOG2_E: Final = 1.4426950408889634
LN2_HIGH: Final = 6.93147180369123816490e-01  # 32 bits, so that products with small integers are exact
LN2_LOW: Final = 1.90821492927058770002e-10
EXPONENTIAL_COEFFICIENTS: Final = tuple(1 / math.factorial(term) for term in range(14, -1, -1))
"""Of the powers of what is left of a power, the highest first."""

LOGARITHM_COEFFICIENTS: Final = tuple(1 / (2 * term + 1) for term in range(12, 0, -1))
"""Of the even powers of (m - 1) / (m + 1), the highest first."""


def exponential(values: Array) -> NDArray[np.float64]:
    """Return e to the power of each value, within two units in the last place of float64."""
    powers = np.clip(values.astype(np.float64), -1100, 1100)
    doublings = np.rint(powers * LOG2_E)
    rest = powers - doublings * LN2_HIGH
    rest -= doublings * LN2_LOW
    result = np.full(rest.shape, EXPONENTIAL_COEFFICIENTS[0])
    for coefficient in EXPONENTIAL_COEFFICIENTS[1:]:
        result *= rest
        result += coefficient
    exact: NDArray[np.float64] = np.ldexp(result, np.nan_to_num(doublings).astype(np.int32))
    return exact


def logarithm(values: Array) -> NDArray[np.float64]:
    """Return the natural logarithm of each value, within two units in the last place of float64.

    -inf of zero, NaN of negative numbers.
    """
    mantissas, exponents = np.frexp(values.astype(np.float64))
    small = mantissas < math.sqrt(0.5)
    mantissas = np.where(small, mantissas * 2, mantissas)
    doublings = (exponents - small).astype(np.float64)
    # log(m) = 2 * artanh((m - 1) / (m + 1))
    ratio = (mantissas - 1) / (mantissas + 1)
    square = ratio * ratio
    series = np.full(ratio.shape, LOGARITHM_COEFFICIENTS[0])
    for coefficient in LOGARITHM_COEFFICIENTS[1:]:
        series *= square
        series += coefficient
    series *= square
    twice = 2 * ratio
    result = doublings * LN2_HIGH + (twice + (twice * series + doublings * LN2_LOW))
    plain = values.astype(np.float64)
    result = np.where(plain > 0, result, np.where(plain == 0, -np.inf, np.nan))
    return np.where(np.isposinf(plain), np.inf, result)
