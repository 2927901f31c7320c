"""Codes the delta of one cell into a record, and decodes its first planes."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, F64, DType
from mergefs.kernels.precision import Array, Raw, load, store
from mergefs.kernels.trellis import stream_bytes
from mergefs.kernels.trellis_books import BOOKS
from mergefs.planes.layout import CHECK_BYTES
from mergefs.planes.scales import POWERS, SHARES, exponent_for, scale_codes, scales_of

if TYPE_CHECKING:
    from mergefs.kernels.fused.trellis import Tables


@dataclass(frozen=True, slots=True, eq=False)
class CodedCell:
    """The record of a cell, how many elements have bits in it, and the squared error at each level, from 0 on."""

    record: bytes
    coded: int
    left: tuple[float, ...]


def encode_cell(expert: Array, base: Array, compute: DType, group: int, planes: int) -> CodedCell:
    """Code ``expert`` - ``base``, values of ``compute`` in its carrier, into ``planes`` planes.

    A plane that would bring nothing is left without effect, so errors never rise with the level.
    """
    exact = expert.astype(np.float64)
    deltas = exact - base
    energies = _group_energies(deltas, group)
    energy = float(energies.sum())
    sizes = np.minimum(group, deltas.size - group * np.arange(energies.size))
    largest = float(np.sqrt(energies / sizes).max(initial=0.0))
    if not 0 < largest < float(np.finfo(np.float32).max):
        return CodedCell(b"", 0, (energy,) * (planes + 1))
    exponent = exponent_for(largest)
    codes = scale_codes(np.sqrt(energies / sizes), exponent)
    coded = int(sizes[codes > 0].sum())
    targets = np.ldexp(deltas[np.repeat(codes > 0, sizes)], -exponent).astype(np.float32)
    record: Raw = np.zeros(1 + codes.size + planes * (stream_bytes(coded) + CHECK_BYTES), dtype=np.uint8)
    record[0] = exponent % 256
    record[1 : 1 + codes.size] = codes
    cell = _Cell(exact, store(base, compute, compute), compute, group, coded)
    left = _fill(record, cell, codes, targets, np.cumsum(sizes[codes > 0]), energy)
    return CodedCell(record.tobytes(), coded, left)


@dataclass(frozen=True, slots=True, eq=False)
class Prefixes:
    """The first ``planes`` (one or more) of the records of cells side by side, one after the other in ``data``.

    That of a cell has its of the ``sizes`` in bytes, and bits for its of the ``coded`` elements; a cell without any has
    no record. A cell has ``cell`` elements, the last one or fewer, and a group ``group``.
    """

    data: Raw
    sizes: NDArray[np.int64]
    coded: NDArray[np.int64]
    cell: int
    group: int
    planes: int

    def is_sound(self) -> bool:
        """Return whether they are what was written."""
        ends = np.cumsum(self.sizes).tolist()
        pieces = (self.data[end - size : end] for end, size in zip(ends, self.sizes.tolist(), strict=True) if size)
        return all(_check(piece[:-CHECK_BYTES]) == piece[-CHECK_BYTES:].tobytes() for piece in pieces)

    def decode(self, base: Raw, compute: DType) -> Raw:
        """Return base plus delta, as bytes of ``compute``; ``base`` are the cells' bytes of it.

        The checks are not looked at.
        """
        from mergefs.kernels.fused.trellis import Records, decode

        places = np.cumsum(self.sizes) - self.sizes
        records = Records(self.data, places, self.coded, self.cell, self.group, self.planes, CHECK_BYTES)
        if compute != F64:
            return decode(base, compute, records, SHARES, POWERS, _tables())
        values = base.view(np.float64)
        deltas = decode(np.zeros(values.size * 4, dtype=np.uint8), F32, records, SHARES, POWERS, _tables())
        return store(values + deltas.view(np.float32), F64, F64)


def _check(data: Raw) -> bytes:
    """Return the check of the bytes of a record that stand before it."""
    return blake3(data.data).digest(length=CHECK_BYTES)


@cache
def _tables() -> "Tables":
    """Return the look-up tables of the books."""
    from mergefs.kernels.fused.trellis import Tables

    return Tables.of(BOOKS)


@dataclass(frozen=True, slots=True, eq=False)
class _Cell:
    """What a cell's record is measured against: the expert's values, and the base's bytes of the compute dtype."""

    expert: NDArray[np.float64]
    base: Raw
    compute: DType
    group: int
    coded: int

    def squared_error(self, record: Raw, planes: int) -> float:
        """Return the squared distance of the expert from what the first planes decode to."""
        sizes, coded = np.array([record.size]), np.array([self.coded])
        prefixes = Prefixes(record, sizes, coded, self.expert.size, self.group, planes)
        raw = prefixes.decode(self.base, self.compute)
        difference = self.expert - load(raw, self.compute, self.compute)
        return float((difference * difference).sum())


def _fill(
    record: Raw,
    cell: _Cell,
    codes: NDArray[np.uint8],
    targets: NDArray[np.float32],
    ends: NDArray[np.int64],
    energy: float,
) -> tuple[float, ...]:
    """Write every plane into ``record``, which has its scales, and return the squared errors, from level 0 on.

    ``targets`` are the deltas of the elements that have bits, divided by the power of two of the scales; those up to
    ``ends`` are of a group. ``energy`` is the squared error without any plane.
    """
    from mergefs.kernels.fused.trellis_search import Search

    scales = scales_of(codes[codes > 0], 0)
    sums: NDArray[np.int32] = np.zeros(targets.size, dtype=np.int32)
    search = Search()
    left = [energy]
    start, size = 1 + codes.size, stream_bytes(cell.coded)
    for plane in range((record.size - start) // (size + CHECK_BYTES)):
        bits = record[start : start + size]
        after = sums.copy()
        bits[:] = search.plane(targets, after, ends, scales, BOOKS[plane])
        error = cell.squared_error(record, plane + 1)
        if error <= left[-1]:
            sums = after
        else:
            bits[:], error = 0, left[-1]
        record[start + size : start + size + CHECK_BYTES] = np.frombuffer(_check(record[: start + size]), np.uint8)
        start += size + CHECK_BYTES
        left.append(error)
    return tuple(left)


def _group_energies(deltas: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Return the sum of squares of each group."""
    squares = deltas * deltas
    whole = squares.size - squares.size % group
    energies = squares[:whole].reshape(-1, group).sum(axis=1)
    return energies if whole == squares.size else np.append(energies, squares[whole:].sum())
