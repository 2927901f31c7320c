"""The weighted average in one pass: fused multiply-adds in float32, one rounding at the end."""

import math
from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.prefetching import request
from mergefs.kernels.fused.values import fused_multiply_add, loaded, narrowed, rounded

UNSCALED: Final = 0
DIVIDED: Final = 1
MULTIPLIED: Final = 2

TILE: Final = 2048
_ZERO = np.float32(0)
_EXACT: Final = 126
"""Powers of two below this one, and their inverses, are normal numbers of float32."""
_AT_ONCE = 4
"""Inputs that one sweep over a tile adds."""
_REQUESTED = np.uint64(2 * TILE)
"""Elements that memory is asked for ahead of those that are merged."""


@inlined
def _add_four(result: Any, addresses: Any, weights: Any, k: Any, first: Any, count: Any, total: Any) -> Any:
    """Add the elements of four inputs, one after the other, to ``total``."""
    address0, address1, address2, address3 = addresses[k], addresses[k + 1], addresses[k + 2], addresses[k + 3]
    weight0, weight1, weight2, weight3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
    ahead = first + _REQUESTED
    request(result, address0, ahead, count)
    request(result, address1, ahead, count)
    request(result, address2, ahead, count)
    request(result, address3, ahead, count)
    for i in range(count):
        value = fused_multiply_add(loaded(address0, first + i, result), weight0, total[i])
        value = fused_multiply_add(loaded(address1, first + i, result), weight1, value)
        value = fused_multiply_add(loaded(address2, first + i, result), weight2, value)
        total[i] = fused_multiply_add(loaded(address3, first + i, result), weight3, value)


def _weighted_average(
    result: Any, addresses: Any, weights: Any, scaling: Any, divisor: Any, factor: Any, total: Any
) -> None:
    """Write ``sum(weights * inputs)`` into ``result``, divided, or multiplied as ``scaling`` says.

    ``total`` is a buffer of ``TILE`` float32.
    """
    size = np.uint64(result.size)
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        for i in range(count):
            total[i] = _ZERO
        whole = addresses.size // _AT_ONCE * _AT_ONCE
        for k in range(0, whole, _AT_ONCE):
            _add_four(result, addresses, weights, k, first, count, total)
        for k in range(whole, addresses.size):
            address, weight = addresses[k], weights[k]
            request(result, address, first + _REQUESTED, count)
            for i in range(count):
                total[i] = fused_multiply_add(loaded(address, first + i, result), weight, total[i])
        for i in range(count):
            value = total[i]
            if scaling == DIVIDED:
                value = value / divisor
            elif scaling == MULTIPLIED:
                value = value * factor
            result[first + i] = narrowed(rounded(value, result), result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint64, 1, "C"),
        types.Array(types.float32, 1, "C"),
        types.int64,
        types.float32,
        types.float32,
        types.Array(types.float32, 1, "C"),
    )


KERNEL: Final = Kernel(_weighted_average, _signature)


def scaling_by(divisor: float | None) -> tuple[int, float, float]:
    """Return how a sum is divided: the way, ``DIVIDED`` or another, the divisor, and the factor.

    By a power of two the result is the same number whether one divides, or multiplies by what is exact of it, too; a
    division takes as long as all other work on a sum of four.
    """
    if divisor is None or divisor == 1:
        return UNSCALED, 1.0, 1.0
    mantissa, exponent = math.frexp(divisor)
    if abs(mantissa) == 0.5 and abs(exponent) < _EXACT:
        return MULTIPLIED, divisor, 1 / divisor
    return DIVIDED, divisor, 1.0
