"""Counts of the magnitudes of a delta, straight from the bytes of an expert and its base."""

from typing import Any, Final

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.counting import MagnitudeCounts, count_entries, entry_of
from mergefs.kernels.fused.memory import address, aligned_bytes, empty
from mergefs.kernels.fused.values import loaded, magnitude_bin, rounded
from mergefs.kernels.precision import Raw

TILE: Final = 1024


def _histogram(like: Any, expert: Any, base: Any, size: Any, counts: Any, entries: Any) -> None:
    """Count the magnitudes of the delta of ``size`` elements in ``counts``, the tables of ``MagnitudeCounts``.

    ``like`` is an empty array of the element type that stands for the dtype, ``expert`` and ``base`` are addresses,
    and ``entries`` is a buffer of ``TILE`` uint32.
    """
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        for i in range(count):
            delta = rounded(loaded(expert, first + i, like) - loaded(base, first + i, like), like)
            entries[i] = entry_of(magnitude_bin(delta, like), i)
        count_entries(entries, count, counts)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.uint64,
        types.Array(types.uint32, 2, "C"),
        types.Array(types.uint32, 1, "C"),
    )


KERNEL: Final = Kernel(_histogram, _signature)


class Histogram(MagnitudeCounts):
    """Counts the magnitudes of one delta, block by block."""

    def __init__(self, compute: DType) -> None:
        super().__init__()
        self._itemsize = compute.itemsize
        self._kernel = KERNEL.compiled(compute)
        self._like = empty(0, compute)
        self._entries = aligned_bytes(TILE * 4).view(np.uint32)

    def add(self, expert: Raw, base: Raw) -> None:
        """Count those of a block; bytes are of the compute dtype."""
        size = expert.size // self._itemsize
        self._kernel(self._like, address(expert), address(base), np.uint64(size), self.tables, self._entries)
        self.counted(size)
