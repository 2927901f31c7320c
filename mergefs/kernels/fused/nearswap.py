"""NearSwap in one pass."""

from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import loaded, narrowed, rounded

_ZERO, _ONE = np.float32(0), np.float32(1)


def _nearswap(result: Any, addresses: Any, t: Any, least: Any) -> None:
    """Write ``w * second + (1 - w) * first`` into ``result``; ``least`` is the smallest distance that counts."""
    first_address, second_address = addresses[0], addresses[1]
    for i in range(np.uint64(result.size)):
        first, second = loaded(first_address, i, result), loaded(second_address, i, result)
        distance = abs(rounded(first - second, result))
        distance = least if distance < least else distance
        weight = rounded(rounded(_ONE / distance, result) * t, result)
        weight = _ZERO if weight < _ZERO else weight
        weight = _ONE if weight > _ONE else weight
        rest = rounded(_ONE - weight, result)
        total = rounded(weight * second, result) + rounded(rest * first, result)
        result[i] = narrowed(rounded(total, result), result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(types.Array(element, 1, "C"), types.Array(types.uint64, 1, "C"), types.float32, types.float32)


KERNEL: Final = Kernel(_nearswap, _signature)
