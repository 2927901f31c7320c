"""Counts of the magnitudes of a delta, straight from the bytes of an expert and its base."""

from typing import Any, Final

import numpy as np
from numba.core import types

from mergefs.kernels.fused.compilation import Kernel
from mergefs.kernels.fused.values import loaded, magnitude_bin, rounded

BINS: Final = 1 << 15
TABLES: Final = 4
"""Counts are kept in so many tables by turns, so that equal neighbours do not wait for each other."""

TILE: Final = 2048


def _histogram(like: Any, expert: Any, base: Any, size: Any, counts: Any, bins: Any) -> None:
    """Add the magnitude bins of the delta of ``size`` elements to ``counts``, int64 of ``TABLES`` rows.

    ``like`` is an empty array of the element type that stands for the dtype, ``expert`` and ``base`` are addresses,
    and ``bins`` is a buffer of ``TILE`` uint32.
    """
    first_table, second_table, third_table, fourth_table = counts[0], counts[1], counts[2], counts[3]
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        for i in range(count):
            delta = rounded(loaded(expert, first + i, like) - loaded(base, first + i, like), like)
            bins[i] = magnitude_bin(delta, like)
        whole = count - count % np.uint64(TABLES)
        for i in range(np.uint64(0), whole, np.uint64(TABLES)):
            first_table[bins[i]] += 1
            second_table[bins[i + np.uint64(1)]] += 1
            third_table[bins[i + np.uint64(2)]] += 1
            fourth_table[bins[i + np.uint64(3)]] += 1
        for i in range(whole, count):
            first_table[bins[i]] += 1


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.uint64,
        types.Array(types.int64, 2, "C"),
        types.Array(types.uint32, 1, "C"),
    )


KERNEL: Final = Kernel(_histogram, _signature)
