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
from mergefs.planes.scales import exponent_for, scale_codes, scales_of

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
    kept = np.repeat(codes > 0, sizes)
    record = _Record.empty(codes, exponent, int(kept.sum()), planes)
    cell = _Cell(exact, store(base, compute, compute), compute, group)
    left = _fill(
        record, cell, np.ldexp(deltas[kept], -exponent).astype(np.float32), np.cumsum(sizes[codes > 0]), energy
    )
    return CodedCell(record.data.tobytes(), record.coded, (energy, *left))


def decode_cell(record: Raw, base: Raw, compute: DType, group: int, coded: int, planes: int) -> Raw:
    """Return base plus delta, as bytes of ``compute``, from the record of a cell up to so many ``planes`` (1 or more).

    ``base`` are the cell's bytes of ``compute``. The checks are not looked at; see ``is_sound``.
    """
    view = _Record.read(record, base.size // compute.itemsize, group, coded, planes)
    return view.decode(base, compute, group, planes)


def is_sound(record: Raw, elements: int, group: int, coded: int, planes: int) -> bool:
    """Return whether a record up to so many ``planes`` has the bytes that were written."""
    view = _Record.read(record, elements, group, coded, planes)
    return all(view.check(plane) == bytes(record[view.end(plane) :][:CHECK_BYTES]) for plane in range(planes))


@dataclass(frozen=True, slots=True, eq=False)
class _Record:
    """The bytes of a record, or of its first planes."""

    data: Raw
    groups: int
    coded: int
    planes: int

    @classmethod
    def empty(cls, codes: NDArray[np.uint8], exponent: int, coded: int, planes: int) -> "_Record":
        """Return a record with scales, whose planes are all zero."""
        size = 1 + codes.size + planes * (stream_bytes(coded) + CHECK_BYTES)
        record = cls(np.zeros(size, dtype=np.uint8), codes.size, coded, planes)
        record.data[0] = exponent % 256
        record.data[1 : 1 + codes.size] = codes
        return record

    @classmethod
    def read(cls, data: Raw, elements: int, group: int, coded: int, planes: int) -> "_Record":
        """Return the record of a cell of so many elements."""
        return cls(data, -(-elements // group), coded, planes)

    def start(self, plane: int) -> int:
        """Return where a plane (from 0) begins."""
        return 1 + self.groups + plane * (stream_bytes(self.coded) + CHECK_BYTES)

    def end(self, plane: int) -> int:
        """Return where a plane ends and its check begins."""
        return self.start(plane) + stream_bytes(self.coded)

    def check(self, plane: int) -> bytes:
        """Return the check of a plane; that of the first is one of the scales, too."""
        begin = self.start(plane) if plane else 0
        return blake3(self.data[begin : self.end(plane)].data).digest(length=CHECK_BYTES)

    def decode(self, base: Raw, compute: DType, group: int, planes: int) -> Raw:
        """Return base plus the delta that the first planes have."""
        from mergefs.kernels.fused.trellis import decode

        exponent = int(self.data[:1].view(np.int8)[0])
        scales = scales_of(self.data[1 : 1 + self.groups], exponent)
        starts = np.array([self.start(plane) for plane in range(planes)], dtype=np.int64)
        if compute != F64:
            return decode(base, compute, self.data, starts, scales, group, _tables())
        values = base.view(np.float64)
        deltas = decode(np.zeros(values.size * 4, dtype=np.uint8), F32, self.data, starts, scales, group, _tables())
        return store(values + deltas.view(np.float32), F64, F64)


@dataclass(frozen=True, slots=True, eq=False)
class _Cell:
    """What a cell's record is measured against: the expert's values, and the base's bytes of the compute dtype."""

    expert: NDArray[np.float64]
    base: Raw
    compute: DType
    group: int

    def squared_error(self, record: _Record, planes: int) -> float:
        """Return the squared distance of the expert from what the first planes decode to."""
        decoded = load(record.decode(self.base, self.compute, self.group, planes), self.compute, self.compute)
        difference = self.expert - decoded
        return float((difference * difference).sum())


def _fill(
    record: _Record, cell: _Cell, targets: NDArray[np.float32], ends: NDArray[np.int64], energy: float
) -> list[float]:
    """Write every plane into ``record`` and return the squared error after each.

    ``targets`` are the deltas of the elements that have bits, divided by the power of two of the scales; those up to
    ``ends`` are of a group. ``energy`` is the squared error without any plane.
    """
    from mergefs.kernels.fused.trellis_search import Search

    codes = record.data[1 : 1 + record.groups]
    scales = scales_of(codes[codes > 0], 0)
    sums: NDArray[np.int32] = np.zeros(targets.size, dtype=np.int32)
    search = Search()
    left = [energy]
    for plane in range(record.planes):
        bits = record.data[record.start(plane) : record.end(plane)]
        after = sums.copy()
        bits[:] = search.plane(targets, after, ends, scales, BOOKS[plane])
        error = cell.squared_error(record, plane + 1)
        if error <= left[-1]:
            sums = after
        else:
            bits[:], error = 0, left[-1]
        record.data[record.end(plane) :][:CHECK_BYTES] = np.frombuffer(record.check(plane), dtype=np.uint8)
        left.append(error)
    return left[1:]


def _group_energies(deltas: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Return the sum of squares of each group."""
    squares = deltas * deltas
    whole = squares.size - squares.size % group
    energies = squares[:whole].reshape(-1, group).sum(axis=1)
    return energies if whole == squares.size else np.append(energies, squares[whole:].sum())


@cache
def _tables() -> "Tables":
    """Return the look-up tables of the books."""
    from mergefs.kernels.fused.trellis import Tables

    return Tables.of(BOOKS)
