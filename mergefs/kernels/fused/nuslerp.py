"""Two inputs, or what they add to a base, each times a factor: rounded at each step."""

from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import loaded, narrowed, rounded


def _nuslerp(result: Any, addresses: Any, factors: Any, divide: Any, divisor: Any) -> None:
    """Write ``(factors[0] * first + factors[1] * second) / divisor`` into ``result``.

    The base is the third of ``addresses`` where there are three: then deltas are taken, and the result is added to it.
    """
    first_address, second_address = addresses[0], addresses[1]
    first_factor, second_factor = factors[0], factors[1]
    based = addresses.size == 3
    base_address = addresses[addresses.size - 1]
    for i in range(np.uint64(result.size)):
        first, second = loaded(first_address, i, result), loaded(second_address, i, result)
        base = loaded(base_address, i, result)
        if based:
            first, second = rounded(first - base, result), rounded(second - base, result)
        value = rounded(first_factor * first, result) + rounded(second_factor * second, result)
        value = rounded(value, result)
        if divide:
            value = rounded(value / divisor, result)
        if based:
            value = rounded(base + value, result)
        result[i] = narrowed(value, result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint64, 1, "C"),
        types.Array(types.float32, 1, "C"),
        types.boolean,
        types.float32,
    )


KERNEL: Final = Kernel(_nuslerp, _signature)
