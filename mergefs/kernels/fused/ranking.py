"""Which elements of a delta survive by the ranks of their magnitudes within rows, without sorting where bins are few.

Ranks come from counts of the keys that occur in a row, in one pass over their range; where that is wider than the
tables are, as in F32, from a radix sort by digits of eleven bits.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import address, empty
from mergefs.kernels.fused.values import loaded, magnitude_key, rounded
from mergefs.kernels.precision import Raw
from mergefs.kernels.sums import LANES

BINS: Final = 1 << 15
"""The most keys that are counted one by one: all that a 16 bit type has."""

ENTRIES: Final = BINS + 16
"""With those of zeros."""

_LANES = np.uint64(LANES)
_DIGIT = np.uint64(11)
_DIGITS: Final = 3
_DIGIT_MASK = np.uint64((1 << 11) - 1)
_INDEX_BITS = np.uint64(32)
_INDEX_MASK = np.uint64((1 << 32) - 1)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_NOTHING, _ONE = np.uint32(0), np.uint32(1)
_IDLE = np.uint32(16)
_MOST_KEYS = np.int32(BINS)
_LARGEST_KEY = np.int32(0x7FFFFFFF)


@inlined
def _look(like: Any, expert: Any, base: Any, first: Any, keys: Any) -> Any:
    """Fill ``keys`` with those of a row of the delta, and return the smallest and the largest that are not 0."""
    least, most = _LARGEST_KEY, np.int32(0)
    for i in range(np.uint64(keys.size)):
        delta = rounded(loaded(expert, first + i, like) - loaded(base, first + i, like), like)
        key = magnitude_key(delta, like)
        keys[i] = key
        least = min(least, np.int32(key) if key != _NOTHING else _LARGEST_KEY)
        most = max(most, np.int32(key))
    return min(least, most), most


@inlined
def _draw(key: Any, first: Any, draws: Any) -> Any:
    """Fill ``draws`` with those of the elements from the flat index ``first`` on."""
    for i in range(np.uint64(draws.size)):
        state = key + (first + i + np.uint64(1)) * _GAMMA
        state = (state ^ (state >> np.uint64(30))) * _FIRST_FACTOR
        state = (state ^ (state >> np.uint64(27))) * _SECOND_FACTOR
        draws[i] = np.uint32((state ^ (state >> np.uint64(31))) >> np.uint64(40))


@inlined
def _mark_by_counting(keys: Any, draws: Any, least: Any, span: Any, limits: Any, counts: Any, marks: Any) -> Any:
    """Mark the survivors of a row whose keys are 0 or lie within ``span`` from ``least`` on.

    Zeros, of which there are many in what fine-tuning changed, have no bin, where each would wait for the one before:
    their ranks are counted apart, and they visit entries that nobody looks at by turns.
    """
    size = np.uint64(keys.size)
    for entry in range(_IDLE + span):
        counts[entry] = 0
    for i in range(size):
        key = keys[i]
        keys[i] = key - least + _IDLE if key != _NOTHING else np.uint32(i & np.uint64(_IDLE - _ONE))
    for i in range(size):
        counts[keys[i]] += _ONE
    before = _NOTHING
    for entry in range(_IDLE):
        before += counts[entry]
    for entry in range(_IDLE, _IDLE + span):
        here = counts[entry]
        counts[entry] = before
        before += here
    zeros = _NOTHING
    for i in range(size):
        entry = keys[i]
        of_entry = counts[entry]
        counts[entry] = of_entry + _ONE
        is_zero = entry < _IDLE
        rank = zeros if is_zero else of_entry
        zeros += np.uint32(is_zero)
        marks[i] = draws[i] < limits[rank]


@inlined
def _mark_by_digits(keys: Any, draws: Any, limits: Any, counts: Any, order: Any, marks: Any) -> Any:
    """Mark the survivors of a row after sorting it; ``order`` is a buffer of two rows of uint64."""
    size = np.uint64(keys.size)
    for i in range(size):
        order[0, i] = (np.uint64(keys[i]) << _INDEX_BITS) | i
    for digit in range(_DIGITS):
        source, target = order[digit & 1], order[1 - (digit & 1)]
        shift = _INDEX_BITS + _DIGIT * np.uint64(digit)
        for bin in range(_DIGIT_MASK + np.uint64(1)):
            counts[bin] = 0
        for i in range(size):
            counts[(source[i] >> shift) & _DIGIT_MASK] += _ONE
        before = np.uint32(0)
        for bin in range(_DIGIT_MASK + np.uint64(1)):
            here = counts[bin]
            counts[bin] = before
            before += here
        for i in range(size):
            bin = (source[i] >> shift) & _DIGIT_MASK
            target[counts[bin]] = source[i]
            counts[bin] += _ONE
    for rank in range(size):
        index = order[_DIGITS & 1, rank] & _INDEX_MASK
        marks[index] = draws[index] < limits[rank]


def _rank(
    like: Any,
    expert: Any,
    base: Any,
    start: Any,
    key: Any,
    limits: Any,
    marks: Any,
    keys: Any,
    draws: Any,
    counts: Any,
    order: Any,
) -> None:
    """Mark the survivors among whole rows, the first of whose elements has the flat index ``start``.

    ``like`` is an empty array of the element type that stands for the dtype of the bytes at the addresses ``expert``
    and ``base``. ``limits`` say for each rank of a row below which draw it survives; ``marks`` (uint8) are set to 1
    where one does, else to 0. The others are buffers: ``keys`` and ``draws``
    (uint32) of a row, ``counts`` (uint32) of ``ENTRIES``, ``order`` (uint64) of two rows.
    """
    row = np.uint64(limits.size)
    for first in range(np.uint64(0), np.uint64(marks.size), row):
        least, most = _look(like, expert, base, first, keys)
        _draw(key, start + first, draws)
        of_row = marks[first : first + row]
        if most - least < _MOST_KEYS:
            span = np.uint32(most - least) + _ONE
            _mark_by_counting(keys, draws, np.uint32(least), span, limits, counts, of_row)
        else:
            _mark_by_digits(keys, draws, limits, counts, order, of_row)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    singles = types.Array(types.uint32, 1, "C")
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.uint64,
        types.uint64,
        singles,
        types.Array(types.uint8, 1, "C"),
        singles,
        singles,
        singles,
        types.Array(types.uint64, 2, "C"),
    )


def _add_marked(like: Any, expert: Any, base: Any, marks: Any, lanes: Any) -> None:
    """Add the magnitudes of a delta to 128 lanes (float64), and those that ``marks`` keep to as many others."""
    every, kept = lanes[0], lanes[1]
    size = np.uint64(marks.size)
    for first in range(np.uint64(0), size, _LANES):
        for i in range(min(_LANES, size - first)):
            delta = rounded(loaded(expert, first + i, like) - loaded(base, first + i, like), like)
            every[i] += np.float64(abs(delta))
            kept[i] += np.float64(abs(delta * np.float32(marks[first + i])))


def _signature_of_sums(element: Any) -> Any:
    """Return the signature of ``_add_marked`` for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.Array(types.uint8, 1, "C"),
        types.Array(types.float64, 2, "C"),
    )


KERNEL: Final = Kernel(_rank, _signature)
_SUMS: Final = Kernel(_add_marked, _signature_of_sums)
KERNELS: Final = (KERNEL, _SUMS)


def survivors(
    dtype: DType, expert: Raw, base: Raw, start: int, key: int, limits: NDArray[np.uint32]
) -> NDArray[np.uint8]:
    """Return 1 for each element of whole rows that survives, else 0.

    Bytes are of ``dtype``; the first element has the flat index ``start``. ``key`` is that of the stream of draws,
    ``limits`` has one for each rank of a row.
    """
    marks = np.empty(expert.size // dtype.itemsize, dtype=np.uint8)
    KERNEL.compiled(dtype)(
        empty(0, dtype),
        address(expert),
        address(base),
        np.uint64(start),
        np.uint64(key),
        limits,
        marks,
        np.empty(limits.size, dtype=np.uint32),
        np.empty(limits.size, dtype=np.uint32),
        np.empty(ENTRIES, dtype=np.uint32),
        np.empty((2, limits.size), dtype=np.uint64),
    )
    return marks


def add_magnitudes(dtype: DType, expert: Raw, base: Raw, marks: NDArray[np.uint8], lanes: NDArray[np.float64]) -> None:
    """Add the magnitudes of a block's delta to the first row of ``lanes``, and those of the survivors to the second."""
    _SUMS.compiled(dtype)(empty(0, dtype), address(expert), address(base), marks, lanes)
