"""Whether a block holds NaN or infinity, in one pass: ``mergefs.kernels.precision.is_finite`` is what defines it."""

from typing import Any, Final

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import address, empty
from mergefs.kernels.fused.values import loaded, magnitude_bits
from mergefs.kernels.precision import Raw

_INFINITY: Final = 0x7F800000
"""The bits of float32, in which values are carried: those of NaN are greater, those of all numbers smaller."""


def _find_largest(like: Any, values: Any, size: Any, largest: Any) -> None:
    """Find the bits of the largest magnitude of ``size`` elements at the address ``values``."""
    found = np.int32(0)
    for i in range(size):
        bits = magnitude_bits(loaded(values, i, like))
        found = bits if bits > found else found
    largest[0] = found


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(types.Array(element, 1, "C"), types.uint64, types.uint64, types.Array(types.int32, 1, "C"))


KERNEL: Final = Kernel(_find_largest, _signature)


def is_finite(raw: Raw, dtype: DType) -> bool:
    """Return whether ``raw``, elements of a dtype with fused kernels, holds neither NaN nor infinity."""
    largest = np.empty(1, dtype=np.int32)
    KERNEL.compiled(dtype)(empty(0, dtype), address(raw), np.uint64(raw.size // dtype.itemsize), largest)
    return bool(largest[0] < _INFINITY)
