"""SCE in one pass over the inputs: variance, selection, majority sign and weighted mean; and what it asks to know."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import address, addresses, aligned_bytes, empty, empty_result
from mergefs.kernels.fused.values import loaded, magnitude_bits, narrowed, rounded, signed_like
from mergefs.kernels.precision import Raw
from mergefs.kernels.sums import LANES

TILE: Final = 1024
_LANES = np.uint64(LANES)
_PADDING: Final = 48
_BASE, _TOTAL, _MIXED, _DIVISOR, _KEPT, _DELTAS = 0, 1, 2, 3, 4, 5
_MEAN, _SQUARES = 0, 1
_ZERO, _ONE = np.float32(0), np.float32(1)
_WIDE_ZERO = np.float64(0)
_NAN_BITS = np.int64(0x7FFFFFFF)

SELECT_ALL: Final = 0
SELECT_NONE: Final = 1
SELECT_LARGEST: Final = 2


@inlined
def _load(like: Any, stored: Any, base: Any, addresses: Any, first: Any, count: Any, rows: Any) -> Any:
    """Load a tile of the base, and the deltas of all experts."""
    origin = rows[_BASE]
    for i in range(count):
        origin[i] = loaded(base, first + i, stored)
    for k in range(addresses.size):
        address, deltas = addresses[k], rows[_DELTAS + k]
        for i in range(count):
            deltas[i] = rounded(loaded(address, first + i, stored) - origin[i], like)


@inlined
def _vary(like: Any, experts: Any, count: Any, rows: Any, wide: Any, variances: Any) -> Any:
    """Fill ``variances`` with those of a tile across the deltas, taken in float64 (Welford 1962) and rounded once."""
    mean, squares = wide[_MEAN], wide[_SQUARES]
    for i in range(count):
        mean[i] = _WIDE_ZERO
        squares[i] = _WIDE_ZERO
    for k in range(experts):
        deltas, number = rows[_DELTAS + k], np.float64(k + 1)
        for i in range(count):
            delta = np.float64(deltas[i])
            distance = delta - mean[i]
            mean[i] = mean[i] + distance / number
            squares[i] = squares[i] + distance * (delta - mean[i])
    for i in range(count):
        variances[i] = rounded(np.float32(squares[i] / np.float64(experts)), like)


@inlined
def _keep(variances: Any, first: Any, last: Any, limit: Any, kept: Any) -> Any:
    """Fill ``kept`` with 1 where the variance has at least the bits ``limit``, else 0; NaN is above all."""
    for i in range(first, last):
        bits = np.int64(magnitude_bits(variances[i])) if variances[i] == variances[i] else _NAN_BITS
        kept[i] = _ONE if bits >= limit else _ZERO


@inlined
def _select(
    like: Any, select: Any, start: Any, first: Any, count: Any, limits: Any, experts: Any, rows: Any, wide: Any
) -> Any:
    """Multiply the deltas of a tile by 1 where they are selected, else by 0."""
    kept = rows[_KEPT]
    if select == SELECT_LARGEST:
        variances = rows[_TOTAL]
        _vary(like, experts, count, rows, wide, variances)
        cut = np.uint64(min(max(limits[0] - start - np.int64(first), 0), np.int64(count)))
        _keep(variances, np.uint64(0), cut, limits[1], kept)
        _keep(variances, cut, count, limits[2], kept)
    else:
        for i in range(count):
            kept[i] = _ZERO
    if select != SELECT_ALL:
        for k in range(experts):
            deltas = rows[_DELTAS + k]
            for i in range(count):
                deltas[i] = deltas[i] * kept[i]


def _sce(
    result: Any,
    base: Any,
    addresses: Any,
    weights: Any,
    smallest: Any,
    select: Any,
    start: Any,
    limits: Any,
    rows: Any,
    wide: Any,
) -> None:
    """Merge a run, whose first element has the flat index ``start``, into ``result``.

    ``smallest`` is the smallest divisor, ``select`` one of the constants above. ``limits`` (int64) are the flat index
    from which on the second limit holds, and the bits of the smallest float32 variance that is selected before it, and
    after it. ``rows`` (float32) and ``wide`` (float64) are buffers.
    """
    total, mixed, divisor = rows[_TOTAL], rows[_MIXED], rows[_DIVISOR]
    size, experts = np.uint64(result.size), addresses.size
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _load(result, result, base, addresses, first, count, rows)
        _select(result, select, start, first, count, limits, experts, rows, wide)
        for i in range(count):
            total[i] = _ZERO
            mixed[i] = _ZERO
            divisor[i] = _ZERO
        for k in range(experts):
            deltas = rows[_DELTAS + k]
            for i in range(count):
                total[i] += deltas[i]
        for i in range(count):
            total[i] = _ONE if rounded(total[i], result) >= _ZERO else -_ONE
        for k in range(experts):
            deltas, weight = rows[_DELTAS + k], weights[k]
            nothing = weight * _ZERO
            for i in range(count):
                factor = weight if signed_like(deltas[i], total[i]) > _ZERO else nothing
                mixed[i] += rounded(deltas[i] * factor, result)
                divisor[i] += factor
        for i in range(count):
            by = rounded(divisor[i], result)
            by = smallest if by < smallest else by
            value = rounded(rounded(mixed[i], result) / by, result)
            result[first + i] = narrowed(rounded(rows[_BASE, i] + value, result), result)


def _energies(
    like: Any,
    base: Any,
    addresses: Any,
    select: Any,
    start: Any,
    limits: Any,
    size: Any,
    lanes: Any,
    rows: Any,
    wide: Any,
) -> None:
    """Add the squares of what is selected of each expert's delta to its 128 ``lanes`` (float64)."""
    experts = addresses.size
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _load(like, like, base, addresses, first, count, rows)
        _select(like, select, start, first, count, limits, experts, rows, wide)
        for k in range(experts):
            deltas, sums = rows[_DELTAS + k], lanes[k]
            for chunk in range(np.uint64(0), count, _LANES):
                for i in range(min(_LANES, count - chunk)):
                    sums[i] += np.float64(rounded(deltas[chunk + i] * deltas[chunk + i], like))


def _varying(like: Any, base: Any, addresses: Any, size: Any, found: Any, rows: Any, wide: Any) -> None:
    """Count in ``found`` (int64) the elements that vary across the deltas."""
    variances = rows[_TOTAL]
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _load(like, like, base, addresses, first, count, rows)
        _vary(like, addresses.size, count, rows, wide, variances)
        here = np.int32(0)
        for i in range(count):
            here += np.int32(variances[i] != _ZERO)
        found[0] += here


def _variances(like: Any, stored: Any, base: Any, addresses: Any, variances: Any, rows: Any, wide: Any) -> None:
    """Fill ``variances`` (float32) with those of each element across the deltas."""
    size, experts, here = np.uint64(variances.size), addresses.size, rows[_TOTAL]
    for first in range(np.uint64(0), size, np.uint64(TILE)):
        count = min(np.uint64(TILE), size - first)
        _load(like, stored, base, addresses, first, count, rows)
        _vary(like, experts, count, rows, wide, here)
        for i in range(count):
            variances[first + i] = here[i]


_ADDRESSES = types.Array(types.uint64, 1, "C")
_SINGLES = types.Array(types.float32, 1, "C")
_ROWS = types.Array(types.float32, 2, "C")
_WIDE = types.Array(types.float64, 2, "C")
_LIMITS = types.Array(types.int64, 1, "C")
_STORED = types.Array(types.uint32, 1, "C")


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    result = types.Array(element, 1, "C")
    return types.void(
        result, types.uint64, _ADDRESSES, _SINGLES, types.float32, types.int64, types.int64, _LIMITS, _ROWS, _WIDE
    )


def _signature_of_energies(element: Any) -> Any:
    """Return the signature of ``_energies`` for one element type."""
    like = types.Array(element, 1, "C")
    selection = types.int64, types.int64, _LIMITS
    return types.void(like, types.uint64, _ADDRESSES, *selection, types.uint64, _WIDE, _ROWS, _WIDE)


def _signature_of_varying(element: Any) -> Any:
    """Return the signature of ``_varying`` for one element type."""
    like = types.Array(element, 1, "C")
    return types.void(like, types.uint64, _ADDRESSES, types.uint64, _LIMITS, _ROWS, _WIDE)


def _signature_of_variances(element: Any) -> Any:
    """Return the signature of ``_variances`` for the element type that stands for the dtype."""
    like = types.Array(element, 1, "C")
    return types.void(like, _STORED, types.uint64, _ADDRESSES, _SINGLES, _ROWS, _WIDE)


KERNEL: Final = Kernel(_sce, _signature)
_ENERGIES: Final = Kernel(_energies, _signature_of_energies)
_VARYING: Final = Kernel(_varying, _signature_of_varying)
_VARIANCES: Final = Kernel(_variances, _signature_of_variances)
KERNELS: Final = (KERNEL, _ENERGIES, _VARYING, _VARIANCES)


def merge(
    dtype: DType,
    inputs: Sequence[Raw],
    weights: Sequence[float],
    smallest: float,
    start: int,
    selection: tuple[int, NDArray[np.int64]],
) -> Raw:
    """Return the merged bytes of the experts and, last, the base, all of ``dtype``.

    ``selection`` are one of the constants above and its limits; see ``_sce``.
    """
    *experts, base = inputs
    result = empty_result(base, dtype)
    select, limits = selection
    KERNEL.compiled(dtype)(
        result,
        address(base),
        addresses(experts),
        np.array(weights, dtype=np.float32),
        np.float32(smallest),
        np.int64(select),
        np.int64(start),
        limits,
        *_buffers(len(experts)),
    )
    merged: Raw = result.view(np.uint8)
    return merged


def energies(
    dtype: DType, inputs: Sequence[Raw], start: int, selection: tuple[int, NDArray[np.int64]]
) -> NDArray[np.float64]:
    """Return 128 lanes for each expert, to which the squares of what is selected of its delta are added."""
    *experts, base = inputs
    lanes = np.zeros((len(experts), LANES), dtype=np.float64)
    select, limits = selection
    _ENERGIES.compiled(dtype)(
        empty(0, dtype),
        address(base),
        addresses(experts),
        np.int64(select),
        np.int64(start),
        limits,
        np.uint64(base.size // dtype.itemsize),
        lanes,
        *_buffers(len(experts)),
    )
    return lanes


def varying(dtype: DType, inputs: Sequence[Raw]) -> int:
    """Return how many elements vary across the deltas."""
    *experts, base = inputs
    found, size = np.zeros(1, dtype=np.int64), np.uint64(base.size // dtype.itemsize)
    given = empty(0, dtype), address(base), addresses(experts), size, found
    _VARYING.compiled(dtype)(*given, *_buffers(len(experts)))
    return int(found[0])


def variances(dtype: DType, inputs: Sequence[Raw]) -> NDArray[np.float32]:
    """Return the variance of each element across the deltas. Bytes are of F32."""
    *experts, base = inputs
    found = np.empty(base.size // F32.itemsize, dtype=np.float32)
    _VARIANCES.compiled(dtype)(
        empty(0, dtype), empty(0, F32), address(base), addresses(experts), found, *_buffers(len(experts))
    )
    return found


def _buffers(experts: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    rows, columns = _DELTAS + experts, TILE + _PADDING
    singles = aligned_bytes(rows * columns * 4).view(np.float32).reshape(rows, columns)
    return singles, aligned_bytes(2 * columns * 8).view(np.float64).reshape(2, columns)
