"""Counts of magnitudes in tables, at most one of which waits for the other where neighbours are equal."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.deltas import MAGNITUDE_BINS
from mergefs.kernels.fused.compilation import inlined
from mergefs.kernels.fused.memory import aligned_bytes

TABLES: Final = 2
"""Magnitudes are counted in so many tables by turns: more of them would leave the first-level cache."""

_ZEROS: Final = 16
"""Zeros are counted in so many entries by turns: often a third and more of all elements are unchanged."""

ROW: Final = MAGNITUDE_BINS + 32
"""Two cache lines more than a table, for the zeros; and tables that lay whole pages apart would share cache lines."""

_MOST_COUNTED: Final = 2**31
"""After so many elements counts move on from uint32."""

_BIN_OF_ZERO = np.uint32(0)
_FIRST_OF_ZEROS = np.uint32(MAGNITUDE_BINS)
_TURNS = np.uint64(_ZEROS - 1)
_TWO, _ONE = np.uint64(TABLES), np.uint32(1)


@inlined
def entry_of(found: Any, i: Any) -> Any:
    """Return the entry that element ``i`` is counted in, whose magnitude lies in the bin ``found``."""
    return found if found != _BIN_OF_ZERO else _FIRST_OF_ZEROS + np.uint32(i & _TURNS)


@inlined
def count_entries(entries: Any, count: Any, counts: Any) -> Any:
    """Count ``count`` entries in the tables by turns."""
    first_table, second_table = counts[0], counts[1]
    whole = count - count % _TWO
    for i in range(np.uint64(0), whole, _TWO):
        first_table[entries[i]] += _ONE
        second_table[entries[i + np.uint64(1)]] += _ONE
    for i in range(whole, count):
        first_table[entries[i]] += _ONE


class MagnitudeCounts:
    """The tables that kernels count in, and the counts of all elements so far."""

    def __init__(self) -> None:
        self.tables: NDArray[np.uint32] = aligned_bytes(TABLES * ROW * 4).view(np.uint32).reshape(TABLES, ROW)
        self.tables[:] = 0
        self._counts: NDArray[np.int64] = np.zeros(MAGNITUDE_BINS, dtype=np.int64)
        self._in_tables = 0

    def counted(self, elements: int) -> None:
        """Know that so many elements, fewer than 2**31, have been counted in the tables."""
        self._in_tables += elements
        if self._in_tables >= _MOST_COUNTED:
            self._empty_tables()

    def total(self) -> NDArray[np.int64]:
        """Return how many magnitudes fell into each bin, in order of magnitude."""
        self._empty_tables()
        counts: NDArray[np.int64] = self._counts.copy()
        return counts

    def _empty_tables(self) -> None:
        """Move counts on to where there is room for any number."""
        self._counts += self.tables[:, :MAGNITUDE_BINS].sum(axis=0, dtype=np.int64)
        self._counts[int(_BIN_OF_ZERO)] += int(self.tables[:, MAGNITUDE_BINS:].sum(dtype=np.int64))
        self.tables[:] = 0
        self._in_tables = 0
