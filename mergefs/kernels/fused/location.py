"""Where elements of a delta lie whose magnitudes are equal, straight from the bytes of an expert and its base."""

from typing import Any, Final

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.memory import address, empty
from mergefs.kernels.fused.values import loaded, magnitude_key, rounded
from mergefs.kernels.precision import Raw

TILE: Final = 4096
_SEEN, _PLACE = 0, 1


def _locate(like: Any, expert: Any, base: Any, size: Any, key: Any, wanted: Any, found: Any) -> None:
    """Count the magnitudes with ``key`` among ``size`` elements, up to the ``wanted``-th of them (from 1).

    ``like`` is an empty array of the element type that stands for the dtype, ``expert`` and ``base`` are addresses.
    Fills ``found`` (int64): how many there are, and the index of the last one wanted, or -1 where there are fewer.
    """
    seen = np.int64(0)
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        here = np.int32(0)
        for i in range(count):
            delta = rounded(loaded(expert, first + i, like) - loaded(base, first + i, like), like)
            here += np.int32(magnitude_key(delta, like) == key)
        if seen + here >= wanted:
            for i in range(count):
                delta = rounded(loaded(expert, first + i, like) - loaded(base, first + i, like), like)
                seen += np.int64(magnitude_key(delta, like) == key)
                if seen == wanted:
                    found[_SEEN], found[_PLACE] = seen, np.int64(first + i)
                    return
        seen += here
    found[_SEEN], found[_PLACE] = seen, -1


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.uint64,
        types.uint32,
        types.int64,
        types.Array(types.int64, 1, "C"),
    )


KERNEL: Final = Kernel(_locate, _signature)


def locate(compute: DType, expert: Raw, base: Raw, key: int, wanted: int) -> tuple[int, int | None]:
    """Return how many magnitudes of a block have ``key``, and the index of the ``wanted``-th of them if it is here.

    Bytes are of the compute dtype, keys are ``Precision.magnitude_keys``, and ``wanted`` is at least 1. Where it is
    found, those behind it are not counted.
    """
    size = np.uint64(expert.size // compute.itemsize)
    found = np.empty(2, dtype=np.int64)
    KERNEL.compiled(compute)(
        empty(0, compute), address(expert), address(base), size, np.uint32(key), np.int64(wanted), found
    )
    seen, place = map(int, found)
    return seen, None if place < 0 else place
