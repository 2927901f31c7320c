"""Decodes trellis planes: four elements with every look-up, bit for bit what ``mergefs.kernels.trellis`` says.

The eleven bits that begin with an element are the states of it and of three more. A table for each plane has for all
such windows the four values, moved up to be positive, in the 16 bit lanes of one integer; so planes are added up four
elements at a time, and no lane runs over into the next.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import types
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import address, empty_result
from mergefs.kernels.fused.values import loaded, narrowed, rounded
from mergefs.kernels.precision import Raw
from mergefs.kernels.trellis import STATE_BITS, STATES, STEP

_LANES: Final = 4
_WINDOWS: Final = STATES << (_LANES - 1)
_TILE: Final = 4096
"""Elements whose sums are kept at once: they stay in the first cache."""

_STEP: Final = np.float32(STEP)


def _sum_planes(sums: Any, record: Any, first: Any, stride: Any, planes: Any, count: Any, tables: Any) -> None:
    """Write the lifted sums of ``count`` bytes of so many planes, from byte ``first`` of the first on, into ``sums``.

    ``sums`` are uint64 of four lanes. Of each plane one more byte is read, for the last seven elements.
    """
    for plane in range(planes):
        at = first + np.uint64(plane) * stride
        table = tables[plane]
        if plane == 0:
            for k in range(np.uint64(count)):
                bits = np.uint32(record[at + k]) | (np.uint32(record[at + k + np.uint64(1)]) << np.uint32(8))
                sums[np.uint64(2) * k] = table[np.uint64(bits & np.uint32(2047))]
                sums[np.uint64(2) * k + np.uint64(1)] = table[np.uint64((bits >> np.uint32(4)) & np.uint32(2047))]
        else:
            for k in range(np.uint64(count)):
                bits = np.uint32(record[at + k]) | (np.uint32(record[at + k + np.uint64(1)]) << np.uint32(8))
                sums[np.uint64(2) * k] += table[np.uint64(bits & np.uint32(2047))]
                sums[np.uint64(2) * k + np.uint64(1)] += table[np.uint64((bits >> np.uint32(4)) & np.uint32(2047))]


_sum_planes_inlined: Final[Any] = inlined(_sum_planes)


def _decode_cell(
    result: Any,
    base: Any,
    first: Any,
    stop: Any,
    record: Any,
    place: Any,
    coded: Any,
    group: Any,
    planes: Any,
    gap: Any,
    shares: Any,
    powers: Any,
    tables: Any,
    lifted: Any,
    sums: Any,
    lanes: Any,
) -> None:
    """Write the elements ``first`` to ``stop`` of ``result``, those of the cell whose record begins at ``place``."""
    power = powers[record[place]]
    codes = place + np.uint64(1)
    start = codes + (stop - first + group - np.uint64(1)) // group
    stride = ((coded + np.uint64(STATE_BITS - 1 + 7)) >> np.uint64(3)) + gap
    used, ready = np.uint64(0), np.uint64(0)
    while first < stop:
        last = min(first + group, stop)
        scale = shares[record[codes]] * power * _STEP
        if record[codes] == np.uint8(0):
            for i in range(first, last):
                result[i] = narrowed(loaded(base, i, result), result)
            first = last
        while first < last:
            if used == ready:
                count = min(np.uint64(_TILE // 8), (coded - used + np.uint64(7)) >> np.uint64(3))
                _sum_planes_inlined(sums, record, start + (used >> np.uint64(3)), stride, planes, count, tables)
                ready += np.uint64(_TILE)
            count = min(last - first, ready - used)
            lane = used % np.uint64(_TILE)
            for i in range(count):
                delta = np.float32(np.int32(lanes[lane + i]) - lifted) * scale
                result[first + i] = narrowed(rounded(loaded(base, first + i, result) + delta, result), result)
            first += count
            used += count
        codes += np.uint64(1)


_decode_cell_inlined: Final[Any] = inlined(_decode_cell)


def _decode(
    result: Any,
    base: Any,
    records: Any,
    places: Any,
    coded: Any,
    step: Any,
    group: Any,
    planes: Any,
    gap: Any,
    shares: Any,
    powers: Any,
    tables: Any,
    lifted: Any,
    sums: Any,
    lanes: Any,
) -> None:
    """Write base plus delta of cells of ``step`` elements into ``result``; the last may be shorter.

    ``base`` is an address. ``places`` (int64) say where in ``records`` the record of each cell begins, ``coded``
    (int64) how many of its elements have bits. A record is the exponent, the scale code of each group of ``group``
    elements, and planes with ``gap`` bytes after each. ``shares`` are the scales of codes, ``powers`` what exponents
    multiply them by. ``sums`` are ``_TILE`` 16 bit numbers of working memory, four in each uint64, and ``lanes`` the
    same as uint16.
    """
    base, group, gap, lifted = np.uint64(base), np.uint64(group), np.uint64(gap), np.int32(lifted)
    for cell in range(places.size):
        first = np.uint64(cell) * np.uint64(step)
        stop = min(first + np.uint64(step), np.uint64(result.size))
        if coded[cell] == 0:
            for i in range(first, stop):
                result[i] = narrowed(loaded(base, i, result), result)
        else:
            _decode_cell_inlined(
                result,
                base,
                first,
                stop,
                records,
                np.uint64(places[cell]),
                np.uint64(coded[cell]),
                group,
                planes,
                gap,
                shares,
                powers,
                tables,
                lifted,
                sums,
                lanes,
            )


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    integers, singles = types.Array(types.int64, 1, "C"), types.Array(types.float32, 1, "C")
    return types.void(
        types.Array(element, 1, "C"),
        types.int64,
        types.Array(types.uint8, 1, "C", readonly=True),
        integers,
        integers,
        types.int64,
        types.int64,
        types.int64,
        types.int64,
        singles,
        singles,
        types.Array(types.uint64, 2, "C"),
        types.int64,
        types.Array(types.uint64, 1, "C"),
        types.Array(types.uint16, 1, "C"),
    )


KERNEL: Final = Kernel(_decode, _signature)


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The tables of ``books``; ``lifted`` says how far the values of all planes up to each are moved up in them."""

    windows: NDArray[np.uint64]
    lifted: NDArray[np.int32]

    @classmethod
    def of(cls, books: NDArray[np.int16]) -> "Tables":
        """Make the tables of ``books`` (planes, states). Raises ValueError where sums could leave 16 bits."""
        offsets = -books.min(axis=1).astype(np.int64)
        raised = books + offsets[:, None]
        if raised.max(axis=1).sum() > np.iinfo(np.uint16).max:
            raise ValueError("the values of these books add up to more than 16 bits hold")
        windows = np.arange(_WINDOWS)
        found: NDArray[np.uint64] = np.zeros((len(books), _WINDOWS), dtype=np.uint64)
        for lane in range(_LANES):
            found |= raised[:, (windows >> lane) % STATES].astype(np.uint64) << np.uint64(16 * lane)
        return cls(found, np.cumsum(offsets).astype(np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Records of cells of ``step`` elements, as far as ``planes`` (one or more) are read.

    That of a cell begins at its of the ``places`` (int64) in ``data``; ``coded`` (int64) says how many elements of each
    have bits, and where none have there is no record. Groups have ``group`` elements, and ``gap`` bytes (one or more)
    follow each plane.
    """

    data: Raw
    places: NDArray[np.int64]
    coded: NDArray[np.int64]
    step: int
    group: int
    planes: int
    gap: int


def decode(
    base: Raw, dtype: DType, records: Records, shares: NDArray[np.float32], powers: NDArray[np.float32], tables: Tables
) -> Raw:
    """Return base plus delta of cells, as bytes of ``dtype``, which has fused kernels.

    ``base`` are the bytes of ``dtype`` of all cells. A scale is the one of ``shares`` that its code names, times the
    one of ``powers`` that the exponent of the cell names.
    """
    result, sums = empty_result(base, dtype), np.empty(_TILE // _LANES, dtype=np.uint64)
    KERNEL.compiled(dtype)(
        result,
        address(base),
        records.data,
        records.places,
        records.coded,
        records.step,
        records.group,
        records.planes,
        records.gap,
        shares,
        powers,
        tables.windows,
        int(tables.lifted[records.planes - 1]),
        sums,
        sums.view(np.uint16),
    )
    decoded: Raw = result.view(np.uint8)
    return decoded
