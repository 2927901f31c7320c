"""The weighted average in one pass: fused multiply-adds in float32, one rounding at the end."""

from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import fused_multiply_add, loaded, narrowed, rounded

TILE: Final = 2048
_ZERO = np.float32(0)


def _weighted_average(result: Any, addresses: Any, weights: Any, divide: Any, divisor: Any, total: Any) -> None:
    """Write ``sum(weights * inputs) / divisor`` into ``result``; ``total`` is a buffer of ``TILE`` float32."""
    size = np.uint64(result.size)
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        for i in range(count):
            total[i] = _ZERO
        for k in range(addresses.size):
            address, weight = addresses[k], weights[k]
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
