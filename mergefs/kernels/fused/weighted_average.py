"""The weighted average in one pass: fused multiply-adds in float32, one rounding at the end."""

from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.prefetching import request
from mergefs.kernels.fused.values import fused_multiply_add, loaded, narrowed, rounded

TILE: Final = 2048
_ZERO = np.float32(0)
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


def _weighted_average(result: Any, addresses: Any, weights: Any, divide: Any, divisor: Any, total: Any) -> None:
    """Write ``sum(weights * inputs) / divisor`` into ``result``; ``total`` is a buffer of ``TILE`` float32."""
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
            if divide:
                value = value / divisor
            result[first + i] = narrowed(rounded(value, result), result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint64, 1, "C"),
        types.Array(types.float32, 1, "C"),
        types.boolean,
        types.float32,
        types.Array(types.float32, 1, "C"),
    )


KERNEL: Final = Kernel(_weighted_average, _signature)
