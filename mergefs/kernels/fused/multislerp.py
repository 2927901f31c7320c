"""Multi-SLERP in one pass over the inputs, however many they are."""

from typing import Any, Final

import numpy as np
from numba.core import types

from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import loaded, narrowed, rounded

TILE: Final = 1024
_ZERO = np.float32(0)


def _multislerp(
    result: Any, addresses: Any, base: Any, based: Any, models: Any, line: Any, numbers: Any, buffers: Any
) -> None:
    """Interpolate the inputs at ``addresses``, less the base at the address ``base`` where ``based`` says so.

    ``models`` has a row for each input: weight, length, and projection on the mean. ``line`` asks for the weighted sum;
    else ``numbers`` are the norm of the mean, the factors of mean and tangent, and the radius. ``buffers`` are a row of
    ``TILE`` float32 for each input, one for the mean, and one for the tangent.
    """
    inputs = addresses.size
    mean_norm, ahead, aside, radius = numbers[0], numbers[1], numbers[2], numbers[3]
    mean, tangent = buffers[inputs], buffers[inputs + 1]
    size = np.uint64(result.size)
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        for i in range(count):
            mean[i] = _ZERO
            tangent[i] = _ZERO
        for k in range(inputs):
            address, weight, length, direction = addresses[k], models[k, 0], models[k, 1], buffers[k]
            for i in range(count):
                value = loaded(address, first + i, result)
                if based:
                    value = rounded(value - loaded(base, first + i, result), result)
                if not line:
                    value = rounded(value / length, result)
                direction[i] = value
                mean[i] += rounded(value * weight, result)
        for i in range(count):
            mean[i] = rounded(mean[i], result)
        if not line:
            for i in range(count):
                mean[i] = rounded(mean[i] / mean_norm, result)
            for k in range(inputs):
                weight, projection, direction = models[k, 0], models[k, 2], buffers[k]
                for i in range(count):
                    beside = rounded(direction[i] - rounded(projection * mean[i], result), result)
                    tangent[i] += rounded(beside * weight, result)
            for i in range(count):
                turned = rounded(mean[i] * ahead, result) + rounded(rounded(tangent[i], result) * aside, result)
                mean[i] = rounded(rounded(turned, result) * radius, result)
        for i in range(count):
            value = mean[i]
            if based:
                value = rounded(value + loaded(base, first + i, result), result)
            result[first + i] = narrowed(value, result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.Array(types.uint64, 1, "C"),
        types.uint64,
        types.boolean,
        types.Array(types.float32, 2, "C"),
        types.boolean,
        types.Array(types.float32, 1, "C"),
        types.Array(types.float32, 2, "C"),
    )


KERNEL: Final = Kernel(_multislerp, _signature)
