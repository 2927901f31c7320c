"""Tensors whose rows are gathered from the tensors of several models: embeddings of a merged vocabulary.

A row is an entry of the first dimension, whatever its shape: one number of a bias, a vector of an embedding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Array, Precision, Raw, load, store
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place, Role, StoredTensor
from mergefs.sources.reader import SourceReader

ZERO: Final = -1
AVERAGE: Final = -2
"""What ``RowTable.part`` says of rows that no single part has."""


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """Where each row of a gathered tensor comes from.

    ``part`` (int16) is the index of the part that has the row, ZERO, or AVERAGE; ``row`` (int64) the number of the row
    there, or of the line of ``averages``. A line of ``averages`` (int64, one column for each part) names the rows that
    are averaged, -1 where a part has none.
    """

    part: NDArray[np.int16]
    row: NDArray[np.int64]
    averages: NDArray[np.int64]

    @property
    def size(self) -> int:
        """The number of rows."""
        return int(self.part.size)

    def digest(self) -> bytes:
        """Return a hash of the table."""
        hasher = blake3()
        for array in (self.part, self.row, self.averages):
            hasher.update(f"{array.dtype.str} {array.shape}\n".encode())
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.digest()

    def only(self, rows: NDArray[np.bool_]) -> "RowTable":
        """Return the table of a tensor that has none but the chosen rows."""
        return RowTable(self.part[rows], self.row[rows], self.averages)

    def is_part(self, index: int, height: int) -> bool:
        """Return whether the gathered tensor is nothing but the part ``index``, which has ``height`` rows."""
        return (
            self.size == height
            and bool((self.part == index).all())
            and bool((self.row == np.arange(height, dtype=np.int64)).all())
        )

    def reads(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return what the rows ``start`` to ``stop`` need, as parallel arrays: the row, a part, and the row there."""
        part, row = self.part[start:stop].astype(np.int64), self.row[start:stop]
        single, averaged = np.flatnonzero(part >= 0), np.flatnonzero(part == AVERAGE)
        lines = self.averages[row[averaged]]
        which, averaged_part = np.nonzero(lines >= 0)
        return (
            start + np.concatenate([single, averaged[which]]),
            np.concatenate([part[single], averaged_part]),
            np.concatenate([row[single], lines[which, averaged_part]]),
        )


class RowMeans(Protocol):
    """Gathers means over the rows of whole tensors, each once."""

    def mean_row(self, rows: Place) -> Raw:
        """Return the mean of all entries of the first dimension, as bytes of the tensor's dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class GatheredRows(Place):
    """A tensor whose rows are read from single parts, averaged over several, or zero, as ``table`` says.

    The parts, ``origins``, have the same shape but for the number of rows. What is read is of type ``element``: rows of
    another type are converted to it, and averages are taken in it as torch does, rounding after each addition and
    after the division.
    Rows that lie next to each other are read at once, and a row that a range needs several times is read once.
    """

    origins: tuple[Place, ...]
    table: RowTable
    element: DType
    _digest: bytes = field(init=False, repr=False)
    _sizes: dict[tuple[BlockGrid, Role], NDArray[np.int64]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_digest", self.table.digest())
        object.__setattr__(self, "_sizes", {})

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as the table has."""
        return (self.table.size, *self.origins[0].shape[1:])

    @property
    def dtype(self) -> DType:
        """That of the merge."""
        return self.element

    @property
    def parts(self) -> tuple[Place, ...]:
        """What rows are gathered from."""
        return self.origins

    @property
    def formula(self) -> bytes:
        """The table."""
        return b"gathered " + self.dtype.name.encode() + b" " + self._digest

    def describe(self) -> str:
        """Name the first part that rows are gathered from, and how many more there are."""
        more = len(self.parts) - 1
        return f"rows gathered from {self.parts[0].describe()}{f' and {more} others' if more else ''}"

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Read the rows that hold the elements."""
        if start >= stop:
            return np.empty(0, dtype=np.uint8)
        size = self._row_size
        first, last = start // size, -(-stop // size)
        rows = self._read_rows(reader, first, last, purpose).reshape(-1)
        itemsize = self.dtype.itemsize
        return rows[(start - first * size) * itemsize : (stop - first * size) * itemsize]

    def bytes_read(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """The distinct rows that lie in a block, or reach into it."""
        known = self._sizes.get((grid, role))
        if known is None:
            known = self._sizes[grid, role] = self._bytes_of_rows(grid, role)
        return known

    @property
    def _row_size(self) -> int:
        """The number of elements of a row."""
        return math.prod(self.shape[1:])

    def _read_rows(self, reader: SourceReader, first: int, last: int, purpose: Purpose) -> Raw:
        """Return whole rows, as an array of bytes with a line for each."""
        wanted, part, row = self.table.reads(first, last)
        result: Raw = np.zeros((last - first, self._row_size * self.dtype.itemsize), dtype=np.uint8)
        averaged = self.table.part[first:last] == AVERAGE
        terms: list[tuple[NDArray[np.int64], Raw]] = []
        for index in np.unique(part):
            of_part = part == index
            needed, position = np.unique(row[of_part], return_inverse=True)
            lines = self._fetch(reader, self.parts[index], needed, purpose)[position]
            target = wanted[of_part] - first
            direct = ~averaged[target]
            result[target[direct]] = lines[direct]
            if not direct.all():
                terms.append((target[~direct], lines[~direct]))
        if averaged.any():
            result[averaged] = self._average(terms, np.flatnonzero(averaged), last - first)
        return result

    def _fetch(self, reader: SourceReader, part: Place, rows: NDArray[np.int64], purpose: Purpose) -> Raw:
        """Return distinct rows of a part, in ascending order, as bytes of ``dtype`` with a line for each."""
        size = self._row_size
        pieces = [part.read(reader, start * size, stop * size, purpose) for start, stop in _runs(rows)]
        raw = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if part.dtype != self.dtype:
            with np.errstate(all="ignore"):
                raw = store(load(raw, part.dtype, self.dtype), self.dtype, self.dtype)
        return raw.reshape(rows.size, -1)

    def _average(self, terms: Sequence[tuple[NDArray[np.int64], Raw]], averaged: NDArray[np.int64], count: int) -> Raw:
        """Return the averaged rows, from the terms of each part: their rows (numbers below ``count``) and bytes."""
        precision = Precision(self.dtype)
        total: Array = np.zeros((count, self._row_size), dtype=precision.carrier)
        number = np.zeros(count, dtype=precision.carrier)
        with np.errstate(all="ignore"):
            for rows, lines in terms:
                values = load(np.ascontiguousarray(lines).reshape(-1), self.dtype, self.dtype)
                total[rows] = precision.round(total[rows] + values.reshape(rows.size, self._row_size))
                number[rows] += 1
            means = precision.round(total[averaged] / number[averaged, np.newaxis])
            stored = store(means.reshape(-1), self.dtype, self.dtype)
        averages: Raw = stored.reshape(averaged.size, -1)
        return averages

    def _bytes_of_rows(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """Return the bytes of each block."""
        total: NDArray[np.int64] = np.zeros(grid.count, dtype=np.int64)
        size = self._row_size
        if not size:
            return total
        costs = [part.bytes_read(BlockGrid(part.elements, size), role) for part in self.parts]
        wanted, part, row = self.table.reads(0, self.table.size)
        entry, block = _blocks_of_rows(wanted, size, grid)
        height = max(part.shape[0] for part in self.parts)
        key = (block * len(self.parts) + part[entry]) * height + row[entry]
        distinct = np.unique(key)
        block, part, row = (
            distinct // height // len(self.parts),
            distinct // height % len(self.parts),
            distinct % height,
        )
        for index, cost in enumerate(costs):
            of_part = part == index
            np.add.at(total, block[of_part], cost[row[of_part]])
        return total


@dataclass(frozen=True, slots=True, eq=False)
class GatheredComputedRows(GatheredRows):
    """Rows of parts that are computed themselves: what a single row of them costs depends on the rows beside it."""

    @property
    def divisible(self) -> bool:
        """All of it is bought or nothing."""
        return False

    def total_bytes_read(self, role: Role) -> int:
        """The blocks of the parts that rows lie in, and all of a part that is bought whole."""
        _, part, row = self.table.reads(0, self.table.size)
        return sum(
            self._bytes_of_blocks(place, np.unique(row[part == index]), role) for index, place in enumerate(self.parts)
        )

    def _bytes_of_blocks(self, place: Place, rows: NDArray[np.int64], role: Role) -> int:
        """Return the bytes of the blocks of ``place`` that hold ``rows``."""
        if not place.divisible:
            return place.total_bytes_read(role)
        grid = BlockGrid.of(place.shape)
        _, blocks = _blocks_of_rows(rows, self._row_size, grid)
        return int(place.bytes_read(grid, role)[np.unique(blocks)].sum())


@dataclass(frozen=True, slots=True, eq=False)
class MeanRow(Place):
    """One row, the mean of all rows of another tensor, for ids that no token has.

    The mean is gathered once, on the account of the analysis.
    """

    rows: Place
    means: RowMeans = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """One row."""
        return (1, *self.rows.shape[1:])

    @property
    def dtype(self) -> DType:
        """That of the rows."""
        return self.rows.dtype

    @property
    def parts(self) -> tuple[Place, ...]:
        """The tensor with the rows."""
        return (self.rows,)

    @property
    def formula(self) -> bytes:
        """The mean."""
        return b"mean of rows"

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Return a part of the mean."""
        itemsize = self.dtype.itemsize
        row: Raw = self.means.mean_row(self.rows)[start * itemsize : stop * itemsize].copy()
        return row

    def bytes_read(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """Nothing: it is known."""
        return np.zeros(grid.count, dtype=np.int64)

    def prepare(self) -> None:
        """Gather the mean."""
        self.rows.prepare()
        self.means.mean_row(self.rows)

    def describe(self) -> str:
        """Name the tensor with the rows."""
        return f"the mean row of {self.rows.describe()}"


@dataclass(frozen=True, slots=True, eq=False)
class FirstRows(Place):
    """The first ``height`` rows of another tensor."""

    whole: Place
    height: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as are taken."""
        return (self.height, *self.whole.shape[1:])

    @property
    def dtype(self) -> DType:
        """That of the whole."""
        return self.whole.dtype

    @property
    def parts(self) -> tuple[Place, ...]:
        """The whole."""
        return (self.whole,)

    @property
    def formula(self) -> bytes:
        """The number of rows."""
        return f"first {self.height} rows".encode()

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Read from the whole."""
        return self.whole.read(reader, start, stop, purpose)

    def bytes_read(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """The same as of the whole."""
        return self.whole.bytes_read(grid, role)

    def describe(self) -> str:
        """Name the whole."""
        return f"the first {self.height} rows of {self.whole.describe()}"


def gather_rows(places: Sequence[Place], table: RowTable, dtype: DType) -> Place:
    """Return the tensor that ``table`` gathers from ``places``; one of them where the table leaves it as it is."""
    whole = next((place for index, place in enumerate(places) if table.is_part(index, place.shape[0])), None)
    return _with_parts_in_use(places, table, dtype) if whole is None else whole


def gather_padded_rows(
    places: Sequence[Place], table: RowTable, used: NDArray[np.bool_], dtype: DType, means: RowMeans
) -> Place:
    """Return the tensor that ``table`` gathers from ``places``, with the mean of the ``used`` rows as the others."""
    rows = _with_parts_in_use(places, table.only(used), dtype)
    return _padded(rows, used, MeanRow(rows, means))


def _padded(rows: GatheredRows, used: NDArray[np.bool_], padding: MeanRow) -> GatheredRows:
    """Return ``rows`` as those of the used ids, and ``padding`` for the others."""
    part: NDArray[np.int16] = np.full(used.size, len(rows.parts), dtype=np.int16)
    row: NDArray[np.int64] = np.zeros(used.size, dtype=np.int64)
    part[used], row[used] = rows.table.part, rows.table.row
    none = np.full((rows.table.averages.shape[0], 1), -1, dtype=np.int64)
    table = RowTable(part, row, np.hstack([rows.table.averages, none]))
    return type(rows)((*rows.parts, padding), table, rows.dtype)


def _with_parts_in_use(places: Sequence[Place], table: RowTable, dtype: DType) -> GatheredRows:
    """Return the gathered rows with no other parts than those that rows are read from."""
    _, part, _ = table.reads(0, table.size)
    in_use = np.unique(part) if part.size else np.zeros(1, dtype=np.int64)
    number = np.full(len(places), -1, dtype=np.int16)
    number[in_use] = np.arange(in_use.size)
    renumbered = np.where(table.part >= 0, number[np.maximum(table.part, 0)], table.part).astype(np.int16)
    parts = tuple(places[index] for index in in_use)
    kind = GatheredRows if all(map(_costs_by_rows, parts)) else GatheredComputedRows
    return kind(parts, RowTable(renumbered, table.row, table.averages[:, in_use]), dtype)


def _costs_by_rows(place: Place) -> bool:
    """Return whether reading a row of ``place`` costs the same whatever rows are read beside it."""
    if isinstance(place, GatheredRows | FirstRows):
        return all(map(_costs_by_rows, place.parts))
    return isinstance(place, StoredTensor | MeanRow)


def _blocks_of_rows(rows: NDArray[np.int64], size: int, grid: BlockGrid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the blocks that ``rows`` of ``size`` elements lie in or reach into, as pairs: index into rows, block."""
    first, last = rows * size // grid.step, ((rows + 1) * size - 1) // grid.step
    counts = last - first + 1
    entry = np.repeat(np.arange(rows.size), counts)
    within = np.arange(entry.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return entry, first[entry] + within


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the first row and the one after the last of each run of consecutive numbers; ``rows`` ascend."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(rows, breaks):
        yield int(run[0]), int(run[-1]) + 1
