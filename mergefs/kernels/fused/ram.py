"""RAM in one pass: what one expert changed, and the mean of what several changed."""

from typing import Any, Final

import numpy as np
from numba.core import types

from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import loaded, narrowed, rounded

TILE: Final = 1024
_ZERO, _ONE = np.float32(0), np.float32(1)


def _ram(result: Any, base: Any, addresses: Any, epsilon: Any, count: Any, total: Any) -> None:
    """Add to the base at the address ``base`` what the experts at ``addresses`` changed by more than ``epsilon``.

    ``count`` and ``total`` are buffers of ``TILE`` float32.
    """
    size = np.uint64(result.size)
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        here = min(np.uint64(TILE), size - first)
        for i in range(here):
            count[i] = _ZERO
            total[i] = _ZERO
        for k in range(addresses.size):
            address = addresses[k]
            for i in range(here):
                delta = rounded(loaded(address, first + i, result) - loaded(base, first + i, result), result)
                count[i] += _ONE if abs(delta) > epsilon else _ZERO
        for k in range(addresses.size):
            address = addresses[k]
            for i in range(here):
                delta = rounded(loaded(address, first + i, result) - loaded(base, first + i, result), result)
                delta = delta * (_ONE if abs(delta) > epsilon else _ZERO)
                alone = delta * (_ONE if count[i] == _ONE else _ZERO)
                shared = delta * (_ONE if count[i] > _ONE else _ZERO)
                divisor = rounded(count[i] if count[i] > _ONE else _ONE, result)
                total[i] += rounded(alone + rounded(shared / divisor, result), result)
        for i in range(here):
            value = loaded(base, first + i, result) + rounded(total[i], result)
            result[first + i] = narrowed(rounded(value, result), result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.Array(types.uint64, 1, "C"),
        types.float32,
        types.Array(types.float32, 1, "C"),
        types.Array(types.float32, 1, "C"),
    )


KERNEL: Final = Kernel(_ram, _signature)
