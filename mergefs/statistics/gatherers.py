"""What adds up the terms of a statistic, tile by tile: sums, norms, values of rows and sums of columns.

Compiled loops do it where there are some for the compute dtype, with the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.norms import AddSquares, PartialNorm, row_norms
from mergefs.kernels.precision import Array
from mergefs.kernels.sums import AddToLanes, AddTurns, LaneSums, PartialSums
from mergefs.methods.contract import (
    Answer,
    ColumnSums,
    ElementNorms,
    ElementSum,
    ElementSums,
    RowValues,
    SingleSums,
    Vector,
)
from mergefs.statistics.stream import Tile

Streamed: TypeAlias = ElementSum | ElementSums | SingleSums | ElementNorms | RowValues | ColumnSums
"""What is answered by adding up."""


class Gatherer(Protocol):
    """Adds up the terms of one statistic, tile by tile."""

    def add(self, tile: Tile, terms: Array) -> None:
        """Add its terms in the next tile."""

    def answer(self) -> Answer:
        """Return the answer, after all tiles."""


def gatherer_of(statistic: Streamed, size: int, compute: DType) -> Gatherer:
    """Return what gathers ``statistic`` of a tensor of ``size`` elements in a compute dtype."""
    ways = _Ways.of(compute)
    if isinstance(statistic, ElementNorms):
        return _Norms(statistic, compute, ways)
    if isinstance(statistic, ElementSums):
        return _Sums(statistic.count, ways)
    if isinstance(statistic, SingleSums):
        return _SingleSums(statistic.count, size, ways)
    if isinstance(statistic, ColumnSums):
        return _Columns(statistic)
    return _Rows() if isinstance(statistic, RowValues) else _Sum(ways)


@dataclass(frozen=True, slots=True)
class _Ways:
    """The compiled ways to add up, None where there are none: see ``mergefs.kernels.fused``."""

    lanes: AddToLanes | None = None
    squares: AddSquares | None = None
    turns: AddTurns | None = None

    @classmethod
    def of(cls, compute: DType) -> "_Ways":
        """Return those for a compute dtype."""
        if compute not in FUSED_DTYPES:
            return cls()
        from mergefs.kernels.fused.lanes import add_to_lanes
        from mergefs.kernels.fused.squares import add_squares
        from mergefs.kernels.fused.turns import add_turns

        return cls(add_to_lanes, add_squares, add_turns)


class _Sums:
    """Sums the elements of each block in lanes, then the blocks."""

    def __init__(self, count: int, ways: _Ways) -> None:
        self._way = ways.lanes
        self._block = LaneSums.begin(count)
        self._parts: list[Vector] = []

    def add(self, tile: Tile, terms: Array) -> None:
        """Add a tile."""
        self._block = self._block.add(terms, self._way)
        if tile.ends_block:
            self._parts.append(self._block.finish())
            self._block = LaneSums.begin(len(self._block.lanes))

    def answer(self) -> Vector:
        """Return the sums."""
        return sums_of(self._parts, len(self._block.lanes))


class _Sum:
    """Does the same for a single quantity."""

    def __init__(self, ways: _Ways) -> None:
        self._sums = _Sums(1, ways)

    def add(self, tile: Tile, terms: Array) -> None:
        """Add a tile."""
        self._sums.add(tile, terms[None])

    def answer(self) -> float:
        """Return the sum."""
        return float(self._sums.answer()[0])


class _SingleSums:
    """Carries the lanes of float32 sums from tile to tile."""

    def __init__(self, count: int, size: int, ways: _Ways) -> None:
        self._way = ways.turns
        self._partial = PartialSums.begin(count, size)

    def add(self, tile: Tile, terms: Array) -> None:
        """Add a tile."""
        self._partial = self._partial.add(terms.astype(np.float32, copy=False), self._way)

    def answer(self) -> Vector:
        """Return the sums."""
        return self._partial.finish().astype(np.float64)


class _Norms:
    """Carries the lanes of each norm from tile to tile."""

    def __init__(self, statistic: ElementNorms, compute: DType, ways: _Ways) -> None:
        self._way = ways.squares
        self._dtype = F32 if statistic.widened else compute
        self._chunk = statistic.chunk
        self._filled = 0
        self._partial = [PartialNorm.begin()] * statistic.count
        self._finished: list[list[np.float32]] = [[] for _ in range(statistic.count)]

    def add(self, tile: Tile, terms: Array) -> None:
        """Add a tile, piece by piece where it reaches into other chunks."""
        size, first = terms.shape[1], 0
        while first < size:
            last = size if self._chunk is None else min(size, first + self._chunk - self._filled)
            pieces = [row[first:last].astype(np.float32, copy=False) for row in terms]
            self._partial = [
                norm.add(piece, self._dtype, self._way) for norm, piece in zip(self._partial, pieces, strict=True)
            ]
            self._filled += last - first
            if self._filled == self._chunk:
                self._finish_chunk()
            first = last

    def _finish_chunk(self) -> None:
        for finished, norm in zip(self._finished, self._partial, strict=True):
            finished.append(norm.finish())
        self._partial = [PartialNorm.begin()] * len(self._partial)
        self._filled = 0

    def answer(self) -> Vector:
        """Return the norms."""
        if self._filled or not self._finished[0]:
            self._finish_chunk()
        return norms_of(np.array(self._finished, dtype=np.float32), self._chunk is not None)


class _Rows:
    """Puts the values of the rows of all tiles one after the other."""

    def __init__(self) -> None:
        self._parts: list[Vector] = []

    def add(self, tile: Tile, terms: Array) -> None:
        """Add a tile."""
        self._parts.append(terms.astype(np.float64))

    def answer(self) -> Vector:
        """Return the values."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=np.float64)


class _Columns:
    """Sums each column from its first element to its last."""

    def __init__(self, statistic: ColumnSums) -> None:
        self._totals: Array = np.zeros(statistic.columns, dtype=np.float32 if statistic.single else np.float64)

    def add(self, tile: Tile, terms: Array) -> None:
        """Add a tile, which may begin and end within a step along the first dimension."""
        columns = self._totals.size
        values = terms.astype(self._totals.dtype)
        first = tile.start % columns
        head = min(-first % columns, values.size)
        self._totals[first : first + head] += values[:head]
        whole = values[head : values.size - (values.size - head) % columns].reshape(-1, columns)
        # Along the first axis numpy adds one row after the other.
        self._totals = np.add.reduce(np.concatenate((self._totals[None, :], whole)), axis=0)
        tail = values[head + whole.size :]
        self._totals[: tail.size] += tail

    def answer(self) -> Vector:
        """Return the sums."""
        return self._totals.astype(np.float64)


def norms_of(finished: NDArray[np.float32], in_chunks: bool) -> Vector:
    """Return the norms of vectors from those of their chunks, a row for each vector."""
    norms = row_norms(finished, F32) if in_chunks else finished[:, 0]
    return norms.astype(np.float64)


def sums_of(parts: Sequence[Vector], count: int) -> Vector:
    """Return the exact sums of the entries of ``parts``, of which each has ``count``, rounded."""
    return np.array([_total([float(part[entry]) for part in parts]) for entry in range(count)], dtype=np.float64)


def _total(parts: Sequence[float]) -> float:
    """Return the exact sum, rounded; math.fsum refuses infinities of both signs, which come to what is not a number."""
    return math.fsum(parts) if all(map(math.isfinite, parts)) else float(np.sum(parts))
