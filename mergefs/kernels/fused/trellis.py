"""Decodes trellis planes: four elements with every look-up, bit for bit what ``mergefs.kernels.trellis`` says.

The eleven bits that begin with an element are the states of it and of three more. A table for each plane has for all
such windows the four values, moved up to be positive, in the 16 bit lanes of one integer; so planes are added up four
elements at a time, and no lane runs over into the next.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numba.core import types
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused.compilation import Kernel, inlined
from mergefs.kernels.fused.memory import address, empty_result
from mergefs.kernels.fused.values import loaded, narrowed, rounded
from mergefs.kernels.precision import Raw
from mergefs.kernels.trellis import STATES, STEP

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


def _decode(
    result: Any,
    base: Any,
    record: Any,
    start: Any,
    stride: Any,
    planes: Any,
    scales: Any,
    group: Any,
    coded: Any,
    tables: Any,
    lifted: Any,
) -> None:
    """Write base plus delta into ``result``.

    ``base`` is an address. The first plane begins at ``start`` of ``record``, each of the others ``stride`` after the
    one before. ``scales`` (float32) are those of the groups of ``group`` elements; elements of a group of scale zero
    have no bits, so the planes have ``coded`` elements.
    """
    sums = np.empty(_TILE // _LANES, dtype=np.uint64)
    lanes = sums.view(np.uint16)
    base, group, coded = np.uint64(base), np.uint64(group), np.uint64(coded)
    size = np.uint64(result.size)
    used, ready = np.uint64(0), np.uint64(0)
    for index in range(scales.size):
        first = np.uint64(index) * group
        last = min(first + group, size)
        scale = scales[index] * _STEP
        if scale == np.float32(0):
            for i in range(first, last):
                result[i] = narrowed(loaded(base, i, result), result)
            continue
        while first < last:
            if used == ready:
                count = min(np.uint64(_TILE // 8), (coded - used + np.uint64(7)) >> np.uint64(3))
                at = np.uint64(start) + (used >> np.uint64(3))
                _sum_planes_inlined(sums, record, at, np.uint64(stride), planes, count, tables)
                ready += np.uint64(_TILE)
            count = min(last - first, ready - used)
            place = used % np.uint64(_TILE)
            for i in range(count):
                delta = np.float32(np.int32(lanes[place + i]) - np.int32(lifted)) * scale
                result[first + i] = narrowed(rounded(loaded(base, first + i, result) + delta, result), result)
            first += count
            used += count


def _signature(element: Any) -> Any:
    """Return the signature for one element type."""
    return types.void(
        types.Array(element, 1, "C"),
        types.int64,
        types.Array(types.uint8, 1, "C"),
        types.int64,
        types.int64,
        types.int64,
        types.Array(types.float32, 1, "C"),
        types.int64,
        types.int64,
        types.Array(types.uint64, 2, "C"),
        types.int64,
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


@dataclass(frozen=True, slots=True)
class PlaneRun:
    """Planes of a record: where in it the first begins, how far each is from the one before, how many are read.

    They have bits for ``coded`` elements. After each plane the record goes on for a byte or more.
    """

    start: int
    stride: int
    planes: int
    coded: int


def decode(
    base: Raw,
    dtype: DType,
    record: NDArray[np.uint8],
    run: PlaneRun,
    scales: NDArray[np.float32],
    group: int,
    tables: Tables,
) -> Raw:
    """Return base plus delta, as bytes of ``dtype``, which has fused kernels.

    ``base`` are bytes of ``dtype``. ``scales`` has one for each group of ``group`` elements; those of scale zero have
    no bits in the planes, of which one or more are read.
    """
    result = empty_result(base, dtype)
    KERNEL.compiled(dtype)(
        result,
        address(base),
        record,
        run.start,
        run.stride,
        run.planes,
        scales,
        group,
        run.coded,
        tables.windows,
        int(tables.lifted[run.planes - 1]),
    )
    decoded: Raw = result.view(np.uint8)
    return decoded
