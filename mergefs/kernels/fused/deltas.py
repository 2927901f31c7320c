"""The measures of a block of an expert against the base's, and counts of magnitudes, in one pass over their bytes."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.deltas import LANES, BlockMeasures, fold_lanes
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.counting import MagnitudeCounts, count_entries, entry_of
from mergefs.kernels.fused.memory import address, aligned_bytes, empty
from mergefs.kernels.fused.values import bits_differ, flipped, loaded, magnitude_bin, magnitude_bits, rounded
from mergefs.kernels.precision import Raw
from mergefs.kernels.sketch import PLACES, SKETCH_SIZE, folded

TILE: Final = 1024
_CHUNK: Final = np.uint64(SKETCH_SIZE)
_WORD: Final = np.uint64(32)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_ZERO = np.float32(0)
_CHANGED, _LARGEST = 0, 1


@inlined
def _subtract(
    like: Any, expert: Any, base: Any, first: Any, count: Any, deltas: Any, entries: Any, numbers: Any
) -> Any:
    """Fill ``deltas`` and ``entries`` with ``count`` elements; add to ``numbers`` how many changed, and the largest."""
    changed, largest = np.int32(0), np.int32(0)
    for i in range(count):
        theirs, ours = loaded(expert, first + i, like), loaded(base, first + i, like)
        delta = theirs - ours
        deltas[i] = delta
        entries[i] = entry_of(magnitude_bin(rounded(delta, like), like), i)
        changed += bits_differ(theirs, ours)
        largest = max(largest, magnitude_bits(delta))
    numbers[_CHANGED] += changed
    numbers[_LARGEST] = max(numbers[_LARGEST], np.int64(largest))


@inlined
def _add(deltas: Any, first: Any, squares: Any, magnitudes: Any) -> Any:
    """Add a chunk to the lanes of the two sums."""
    for i in range(_CHUNK):
        wide = np.float64(deltas[first + i])
        squares[i] += wide * wide
        magnitudes[i] += abs(wide)


def _add_squares(like: Any, values: Any, size: Any, squares: Any, tile: Any) -> None:
    """Add the squares of ``size`` elements at the address ``values`` to lanes; ``tile`` is a buffer for a chunk."""
    for first in range(np.uint64(0), size, _CHUNK):
        count = min(_CHUNK, size - first)
        for i in range(count):
            tile[i] = loaded(values, first + i, like)
        for i in range(count, _CHUNK):
            tile[i] = _ZERO
        for i in range(_CHUNK):
            wide = np.float64(tile[i])
            squares[i] += wide * wide


@inlined
def _drawn(counter: Any) -> Any:
    """Return the word that SplitMix64 has at ``counter``."""
    state = (counter ^ (counter >> np.uint64(30))) * _FIRST_FACTOR
    state = (state ^ (state >> np.uint64(27))) * _SECOND_FACTOR
    return state ^ (state >> np.uint64(31))


@inlined
def _project(deltas: Any, first: Any, index: Any, places: Any) -> Any:
    """Add a chunk, whose first element has the flat index ``index``, to the sketch; 32 signs at a time."""
    counter = (index + np.uint64(1)) * _GAMMA
    signs = (_drawn(counter), _drawn(counter + _GAMMA))
    place = _drawn(counter + _GAMMA + _GAMMA) >> np.uint64(57)
    for part in range(np.uint64(4)):
        word = np.uint32(signs[part >> np.uint64(1)] >> (_WORD * (part & np.uint64(1))))
        begin = _WORD * part
        for i in range(_WORD):
            sign = np.uint32(word << (np.uint32(31) - np.uint32(i)))
            places[place + begin + i] += flipped(deltas[first + begin + i], sign)


def _measure(
    like: Any,
    expert: Any,
    base: Any,
    size: Any,
    start: Any,
    lanes: Any,
    places: Any,
    counts: Any,
    numbers: Any,
    deltas: Any,
    entries: Any,
) -> None:
    """Measure ``size`` elements at the addresses ``expert`` and ``base``, the first of which has the index ``start``.

    ``like`` is an empty array of the element type that stands for the dtype. Sums go to ``lanes`` (float64, a row for
    squares and one for magnitudes), ``places`` (float32), ``counts`` (the tables of ``MagnitudeCounts``) and
    ``numbers`` (int64: how many changed, and the bits of the largest magnitude). ``deltas`` (float32) and ``entries``
    (uint32) are buffers of ``TILE`` elements.
    """
    squares, magnitudes = lanes[0], lanes[1]
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _subtract(like, expert, base, first, count, deltas, entries, numbers)
        count_entries(entries, count, counts)
        # Zeros that fill up a chunk change no sum.
        for i in range(count, (count + _CHUNK - np.uint64(1)) // _CHUNK * _CHUNK):
            deltas[i] = _ZERO
        for chunk in range(np.uint64(0), count, _CHUNK):
            _add(deltas, chunk, squares, magnitudes)
            _project(deltas, chunk, start + first + chunk, places)


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.uint64,
        types.uint64,
        types.Array(types.float64, 2, "C"),
        types.Array(types.float32, 1, "C"),
        types.Array(types.uint32, 2, "C"),
        types.Array(types.int64, 1, "C"),
        types.Array(types.float32, 1, "C"),
        types.Array(types.uint32, 1, "C"),
    )


def _signature_of_squares(element: Any) -> Any:
    """Return the signature of ``_add_squares`` for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.uint64,
        types.uint64,
        types.Array(types.float64, 1, "C"),
        types.Array(types.float32, 1, "C"),
    )


KERNEL: Final = Kernel(_measure, _signature)
_SQUARES: Final = Kernel(_add_squares, _signature_of_squares)


class FusedMeter:
    """What ``mergefs.kernels.deltas.ReferenceMeter`` does, for the dtypes that have fused kernels."""

    def __init__(self, compute: DType) -> None:
        self._dtype = compute
        self._kernel = KERNEL.compiled(compute)
        self._like = empty(0, compute)
        self._lanes = aligned_bytes(2 * LANES * 8).view(np.float64).reshape(2, LANES)
        self._places = aligned_bytes(PLACES * 4).view(np.float32)
        self._numbers = np.zeros(2, dtype=np.int64)
        self._deltas = aligned_bytes(TILE * 4).view(np.float32)
        self._entries = aligned_bytes(TILE * 4).view(np.uint32)
        self._counts = MagnitudeCounts()

    def measure(self, expert: Raw, base: Raw, start: int) -> BlockMeasures:
        """Return the measures of a block that begins at the flat index ``start``; bytes are of the compute dtype."""
        size = expert.size // self._dtype.itemsize
        for sums in (self._lanes, self._places, self._numbers):
            sums[:] = 0
        self._kernel(
            self._like,
            address(expert),
            address(base),
            np.uint64(size),
            np.uint64(start),
            self._lanes,
            self._places,
            self._counts.tables,
            self._numbers,
            self._deltas,
            self._entries,
        )
        self._counts.counted(size)
        with np.errstate(all="ignore"):
            return BlockMeasures(
                squared_norm=fold_lanes(self._lanes[0]),
                absolute_sum=fold_lanes(self._lanes[1]),
                largest=float(np.uint32(self._numbers[_LARGEST]).view(np.float32)),
                changed=int(self._numbers[_CHANGED]),
                sketch=folded(self._places),
            )

    def squared_norm(self, values: Raw) -> float:
        """Return the squared norm of a block itself."""
        squares, size = self._lanes[0], np.uint64(values.size // self._dtype.itemsize)
        squares[:] = 0
        _SQUARES.compiled(self._dtype)(self._like, address(values), size, squares, self._deltas)
        with np.errstate(all="ignore"):
            return fold_lanes(squares)

    def histogram(self) -> NDArray[np.int64]:
        """Return how many magnitudes fell into each of the 32,768 bins, in order of magnitude."""
        return self._counts.total()
