"""Counts of the magnitudes of a delta of F32 within one bin, by the half of their bits that the bin leaves open."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import address, empty
from mergefs.kernels.fused.values import loaded, magnitude_key, rounded
from mergefs.kernels.precision import Raw

TILE: Final = 1024
FINE_BINS: Final = 1 << 16
_BITS = np.uint32(16)
_LOWER = np.uint32(FINE_BINS - 1)


def _refine(like: Any, expert: Any, base: Any, size: Any, coarse: Any, counts: Any, keys: Any) -> None:
    """Add those of ``size`` elements in the bin ``coarse`` to ``counts``; ``keys`` is a buffer of ``TILE`` uint32."""
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        here = np.int32(0)
        for i in range(count):
            delta = rounded(loaded(expert, first + i, like) - loaded(base, first + i, like), like)
            key = magnitude_key(delta, like)
            keys[i] = key
            here += np.int32((key >> _BITS) == coarse)
        if here:
            for i in range(count):
                if (keys[i] >> _BITS) == coarse:
                    counts[keys[i] & _LOWER] += 1


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.uint64,
        types.uint32,
        types.Array(types.int64, 1, "C"),
        types.Array(types.uint32, 1, "C"),
    )


KERNEL: Final = Kernel(_refine, _signature)


def refine(expert: Raw, base: Raw, coarse: int, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` (int64 of ``FINE_BINS``) those magnitudes of a block of F32 that lie in the bin ``coarse``."""
    size = np.uint64(expert.size // F32.itemsize)
    keys = np.empty(TILE, dtype=np.uint32)
    KERNEL.compiled(F32)(empty(0, F32), address(expert), address(base), size, np.uint32(coarse), counts, keys)
