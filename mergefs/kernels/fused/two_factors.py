"""Two inputs, each times a factor, added in one pass."""

from typing import Any, Final

import numpy as np

from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import loaded, narrowed, rounded


def _two_factors(result: Any, addresses: Any, factors: Any) -> None:
    """Write ``factors[0] * first + factors[1] * second``, in float32 and rounded once, into ``result``."""
    first_address, second_address = addresses[0], addresses[1]
    first_factor, second_factor = factors[0], factors[1]
    for i in range(np.uint64(result.size)):
        value = loaded(first_address, i, result) * first_factor + loaded(second_address, i, result) * second_factor
        result[i] = narrowed(rounded(value, result), result)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"), types.Array(types.uint64, 1, "C"), types.Array(types.float32, 1, "C")
    )


KERNEL: Final = Kernel(_two_factors, _signature)
