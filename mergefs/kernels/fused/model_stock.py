"""Model Stock in one pass, where the whole tensor has one share."""

from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import loaded, narrowed, rounded

TILE: Final = 1024
_ZERO = np.float32(0)


def _model_stock(result: Any, base: Any, addresses: Any, share: Any, rest: Any, total: Any) -> None:
    """Write ``share`` of the mean of the experts at ``addresses`` and ``rest`` of the base into ``result``.

    ``total`` is a buffer of ``TILE`` float32.
    """
    size = np.uint64(result.size)
    count = np.float32(addresses.size)
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        here = min(np.uint64(TILE), size - first)
        for i in range(here):
            total[i] = _ZERO
        for k in range(addresses.size):
            address = addresses[k]
            for i in range(here):
                total[i] = rounded(total[i] + loaded(address, first + i, result), result)
        for i in range(here):
            mean = rounded(total[i] / count, result)
            value = rounded(share * mean, result) + rounded(rest * loaded(base, first + i, result), result)
            result[first + i] = narrowed(rounded(value, result), result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.Array(types.uint64, 1, "C"),
        types.float32,
        types.float32,
        types.Array(types.float32, 1, "C"),
    )


KERNEL: Final = Kernel(_model_stock, _signature)
