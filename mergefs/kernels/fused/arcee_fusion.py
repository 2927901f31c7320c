"""Arcee Fusion: the divergence of each row, the importance of each change, and the merge, each in one pass."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.elementary import exponential, logarithm
from mergefs.kernels.fused.memory import address, empty, empty_result
from mergefs.kernels.fused.values import loaded, narrowed, rounded
from mergefs.kernels.precision import Raw
from mergefs.kernels.sums import LANES

_ZERO, _ONE = np.float32(0), np.float32(1)
_NAN, _LOWEST = np.float32(np.nan), np.float32(-np.inf)
_WIDE_ZERO = np.float64(0)
_LANES = np.uint64(LANES)


@inlined
def _clear(lanes: Any) -> Any:
    """Set all lanes to zero."""
    for lane in range(_LANES):
        lanes[lane] = _WIDE_ZERO


@inlined
def _folded(lanes: Any) -> Any:
    """Return the sum of all lanes, added in halves."""
    half = _LANES >> np.uint64(1)
    while half > np.uint64(0):
        for lane in range(half):
            lanes[lane] = lanes[lane] + lanes[lane + half]
        half = half >> np.uint64(1)
    return lanes[0]


@inlined
def _add(terms: Any, lanes: Any) -> Any:
    """Add float32 to the lanes by turns."""
    size = np.uint64(terms.size)
    for first in range(np.uint64(0), size, _LANES):
        for i in range(min(_LANES, size - first)):
            lanes[i] += np.float64(terms[first + i])


@inlined
def _softmax(like: Any, stored: Any, address: Any, first: Any, least: Any, powers: Any, lanes: Any) -> Any:
    """Fill ``powers`` with the softmax of a row, rounded, plus ``least``, rounded again."""
    size = np.uint64(powers.size)
    largest, strange = _LOWEST, np.int32(0)
    for i in range(size):
        value = loaded(address, first + i, stored)
        largest = value if value > largest else largest
        strange += np.int32(value != value)
    largest = _NAN if strange else largest
    for i in range(size):
        powers[i] = np.float32(exponential(np.float64(loaded(address, first + i, stored) - largest)))
    _clear(lanes)
    _add(powers, lanes)
    total = np.float32(_folded(lanes))
    for i in range(size):
        powers[i] = rounded(rounded(powers[i] / total, like) + least, like)


def _diverge(
    like: Any, stored: Any, base: Any, other: Any, least: Any, divergences: Any, rows: Any, lanes: Any
) -> None:
    """Fill ``divergences`` (float32) with those of the rows at the address ``other`` from those at ``base``.

    ``least`` is the smallest probability; ``rows`` (float32, two of the size of a row) and ``lanes`` (float64) are
    buffers.
    """
    ours, theirs = rows[0], rows[1]
    row = np.uint64(rows.shape[1])
    for index in range(np.uint64(divergences.size)):
        _softmax(like, stored, base, index * row, least, ours, lanes)
        _softmax(like, stored, other, index * row, least, theirs, lanes)
        for i in range(row):
            ratio = rounded(theirs[i] / ours[i], like)
            ours[i] = rounded(theirs[i] * rounded(np.float32(logarithm(np.float64(ratio))), like), like)
        _clear(lanes)
        _add(ours, lanes)
        divergences[index] = rounded(np.float32(_folded(lanes)), like)


def _weigh(like: Any, stored: Any, base: Any, other: Any, divergences: Any, row: Any, start: Any, results: Any) -> None:
    """Fill ``results`` (float32) with the importance of each change; the first has the flat index ``start``."""
    size, first = np.uint64(results.size), np.uint64(0)
    while first < size:
        index = (start + first) // row
        last = min(size, (index + np.uint64(1)) * row - start)
        divergence = divergences[index]
        for i in range(first, last):
            delta = rounded(loaded(other, i, stored) - loaded(base, i, stored), like)
            results[i] = rounded(abs(delta) * divergence, like)
        first = last


def _fuse(result: Any, base: Any, other: Any, divergences: Any, row: Any, start: Any, threshold: Any) -> None:
    """Add the changes to the base whose importance is at least ``threshold``; see ``_weigh``."""
    size, first = np.uint64(result.size), np.uint64(0)
    while first < size:
        index = (start + first) // row
        last = min(size, (index + np.uint64(1)) * row - start)
        divergence = divergences[index]
        for i in range(first, last):
            ours = loaded(base, i, result)
            delta = rounded(loaded(other, i, result) - ours, result)
            importance = rounded(abs(delta) * divergence, result)
            value = ours + delta * (_ONE if importance >= threshold else _ZERO)
            result[i] = narrowed(rounded(value, result), result)
        first = last


_SINGLES = types.Array(types.float32, 1, "C")
_STORED = types.Array(types.uint32, 1, "C")


def _signature(element: Any) -> Any:
    """Return the signature of ``_fuse`` for one element type."""
    result = types.Array(element, 1, "C")
    return types.void(result, types.uint64, types.uint64, _SINGLES, types.uint64, types.uint64, types.float32)


def _signature_of_importance(element: Any) -> Any:
    """Return the signature of ``_weigh`` for the element type that stands for the dtype."""
    like = types.Array(element, 1, "C")
    return types.void(like, _STORED, types.uint64, types.uint64, _SINGLES, types.uint64, types.uint64, _SINGLES)


def _signature_of_divergences(element: Any) -> Any:
    """Return the signature of ``_diverge`` for the element type that stands for the dtype."""
    like = types.Array(element, 1, "C")
    rows, lanes = types.Array(types.float32, 2, "C"), types.Array(types.float64, 1, "C")
    return types.void(like, _STORED, types.uint64, types.uint64, types.float32, _SINGLES, rows, lanes)


KERNEL: Final = Kernel(_fuse, _signature)
_IMPORTANCE: Final = Kernel(_weigh, _signature_of_importance)
_DIVERGENCES: Final = Kernel(_diverge, _signature_of_divergences)
KERNELS: Final = (KERNEL, _IMPORTANCE, _DIVERGENCES)


def merge(
    dtype: DType, base: Raw, other: Raw, divergences: NDArray[np.float32], row: int, start: int, threshold: float
) -> Raw:
    """Return the merged bytes of a run, whose first element has the flat index ``start``."""
    result = empty_result(base, dtype)
    places = np.uint64(row), np.uint64(start)
    KERNEL.compiled(dtype)(result, address(base), address(other), divergences, *places, np.float32(threshold))
    merged: Raw = result.view(np.uint8)
    return merged


def importance(
    dtype: DType, base: Raw, other: Raw, divergences: NDArray[np.float32], row: int, start: int
) -> NDArray[np.float32]:
    """Return how important each change of a run is; bytes are of F32 and hold values of ``dtype``."""
    results = np.empty(base.size // F32.itemsize, dtype=np.float32)
    inputs = empty(0, dtype), empty(0, F32), address(base), address(other)
    _IMPORTANCE.compiled(dtype)(*inputs, divergences, np.uint64(row), np.uint64(start), results)
    return results


def divergences(dtype: DType, base: Raw, other: Raw, row: int, least: float) -> NDArray[np.float32]:
    """Return the divergence of each row; bytes are of F32 and hold values of ``dtype``."""
    results = np.empty(base.size // F32.itemsize // row, dtype=np.float32)
    inputs = empty(0, dtype), empty(0, F32), address(base), address(other)
    buffers = np.empty((2, row), dtype=np.float32), np.empty(LANES, dtype=np.float64)
    _DIVERGENCES.compiled(dtype)(*inputs, np.float32(least), results, *buffers)
    return results
