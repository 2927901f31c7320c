"""Answers about quantities: sums, values of rows, thresholds and quantiles, by streaming over the blocks of a tensor.

numpy's own sums are used and not BLAS, whose order of summation depends on the CPU and on the threads.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeAlias

import numpy as np

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.norms import AddSquares, PartialNorm, row_norms
from mergefs.kernels.precision import Array, Precision, Raw, load
from mergefs.kernels.sums import AddToLanes, AddTurns, LaneSums, PartialSums
from mergefs.methods.contract import (
    LONGEST_ROW,
    Answer,
    Block,
    ColumnSums,
    ElementNorms,
    ElementQuantile,
    ElementSum,
    ElementSums,
    ElementThreshold,
    Quantity,
    RowValues,
    SingleSums,
    Vector,
)
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.sources.reader import SourceReader
from mergefs.statistics.order import Keys, largest, ranked_keys

AboutQuantity: TypeAlias = (
    ElementSum | ElementSums | SingleSums | ElementNorms | RowValues | ColumnSums | ElementThreshold | ElementQuantile
)

_TILE: Final = 32 * 1024
"""Elements whose terms are computed at once: all arrays of them then stay in the second-level cache."""

_Streamed: TypeAlias = ElementSum | ElementSums | SingleSums | ElementNorms | RowValues | ColumnSums


@dataclass(frozen=True, slots=True)
class TensorStream:
    """One tensor of each input of a merge, read block by block in a compute dtype."""

    places: Sequence[Place]
    compute: DType
    reader: SourceReader

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.places[0].elements

    def terms(self, quantities: Sequence[Quantity]) -> Iterator["_Tile"]:
        """Yield the terms of each quantity for tile after tile; each input is read once."""
        precision = _precision(self.compute)
        models = sorted({model for quantity in quantities for model in quantity.models})
        shape = self.places[models[0]].shape
        for start, stop in BlockGrid.of(shape):
            raws = {model: self.places[model].read(self.reader, start, stop, Purpose.ANALYSIS) for model in models}
            for first, last in _tiles(start, stop, shape[-1] if shape else 1):
                values = {model: self._load(model, raw, first - start, last - start) for model, raw in raws.items()}
                with np.errstate(all="ignore"):
                    terms = [
                        self._way(quantity)(Block(tuple(values[model] for model in quantity.models), first), precision)
                        for quantity in quantities
                    ]
                yield _Tile(first, terms, last == stop)

    def keys(self, quantity: Quantity) -> Iterator[tuple[int, Keys]]:
        """Yield for each tile its first flat index and the order keys of a quantity."""
        precision = Precision(self.compute)
        for tile in self.terms([quantity]):
            with np.errstate(all="ignore"):
                yield tile.start, precision.order_keys(tile.terms[0])

    def _way(self, quantity: Quantity) -> Callable[[Block, Precision], Array]:
        """Return what computes the terms of a quantity."""
        return quantity.terms if quantity.fused is None or self.compute not in FUSED_DTYPES else quantity.fused

    def _load(self, model: int, raw: Raw, first: int, last: int) -> Array:
        """Return the elements ``first`` to ``last`` of a block of one input, whose bytes are ``raw``."""
        dtype = self.places[model].dtype
        part = raw[first * dtype.itemsize : last * dtype.itemsize]
        with np.errstate(all="ignore"):
            if self.compute not in FUSED_DTYPES:
                return load(part, dtype, self.compute)
            from mergefs.kernels.fused.arrays import load as load_compiled

            return load_compiled(part, dtype, self.compute)


@dataclass(frozen=True, slots=True)
class _Tile:
    """The terms of each quantity in a run of elements from ``start`` on, and whether that is the last of a block."""

    start: int
    terms: list[Array]
    ends_block: bool


def _tiles(start: int, stop: int, row: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the tiles of a block: whole rows, but where the grid of blocks cuts them, too."""
    step = _TILE if row == 0 or row > LONGEST_ROW else max(1, _TILE // row) * row
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _precision(compute: DType) -> Precision:
    """Return the fastest arithmetic in a dtype."""
    if compute not in FUSED_DTYPES:
        return Precision(compute)
    from mergefs.kernels.fused.arrays import precision_of

    return precision_of(compute)


def answer_quantities(wanted: Sequence[AboutQuantity], stream: TensorStream) -> dict[AboutQuantity, Answer]:
    """Return the answers to ``wanted``: sums and rows from one pass, order statistics from some for each quantity."""
    gathering = {one: _gatherer(one, stream) for one in wanted if isinstance(one, _Streamed)}
    if gathering:
        for tile in stream.terms(list(gathering)):
            for gatherer, values in zip(gathering.values(), tile.terms, strict=True):
                gatherer.add(tile, values)
    found: dict[AboutQuantity, Answer] = {one: gatherer.answer() for one, gatherer in gathering.items()}
    bits = Precision(stream.compute).order_bits
    for one in wanted:
        if isinstance(one, ElementThreshold):
            found[one] = largest(partial(stream.keys, one), bits, stream.size, one.keep)
    return found | _quantiles([one for one in wanted if isinstance(one, ElementQuantile)], stream)


def _quantiles(wanted: Sequence[ElementQuantile], stream: TensorStream) -> dict[AboutQuantity, Answer]:
    """Return the values at all ranks of a quantity from the same passes."""
    precision = Precision(stream.compute)
    groups: dict[Quantity, list[ElementQuantile]] = {}
    for one in wanted:
        groups.setdefault(Quantity(one.name, one.models, one.terms, one.arguments, fused=one.fused), []).append(one)
    found: dict[AboutQuantity, Answer] = {}
    for quantity, group in groups.items():
        ranks = [one.rank for one in group]
        ranked = ranked_keys(partial(stream.keys, quantity), precision.order_bits, ranks)
        found |= {one: precision.of_order_key(place.key) for one, place in zip(group, ranked, strict=True)}
    return found


class _Gatherer(Protocol):
    """Adds up the terms of one statistic, tile by tile."""

    def add(self, tile: "_Tile", terms: Array) -> None: ...
    def answer(self) -> Answer: ...


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

    def add(self, tile: _Tile, terms: Array) -> None:
        """Add a tile."""
        self._block = self._block.add(terms, self._way)
        if tile.ends_block:
            self._parts.append(self._block.finish())
            self._block = LaneSums.begin(len(self._block.lanes))

    def answer(self) -> Vector:
        """Return the sums."""
        count = len(self._block.lanes)
        return np.array([_total([float(part[row]) for part in self._parts]) for row in range(count)], dtype=np.float64)


class _Sum:
    """Does the same for a single quantity."""

    def __init__(self, ways: _Ways) -> None:
        self._sums = _Sums(1, ways)

    def add(self, tile: _Tile, terms: Array) -> None:
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

    def add(self, tile: _Tile, terms: Array) -> None:
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

    def add(self, tile: _Tile, terms: Array) -> None:
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
        if self._chunk is None:
            return np.array([norm.finish() for norm in self._partial], dtype=np.float64)
        if self._filled:
            self._finish_chunk()
        chunks = np.array(self._finished, dtype=np.float32)
        return row_norms(chunks, F32).astype(np.float64)


class _Rows:
    """Puts the values of the rows of all tiles one after the other."""

    def __init__(self) -> None:
        self._parts: list[Vector] = []

    def add(self, tile: _Tile, terms: Array) -> None:
        """Add a tile."""
        self._parts.append(terms.astype(np.float64))

    def answer(self) -> Vector:
        """Return the values."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=np.float64)


class _Columns:
    """Sums each column from its first element to its last."""

    def __init__(self, statistic: ColumnSums) -> None:
        self._totals: Array = np.zeros(statistic.columns, dtype=np.float32 if statistic.single else np.float64)

    def add(self, tile: _Tile, terms: Array) -> None:
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


def _total(parts: Sequence[float]) -> float:
    """Return the exact sum, rounded; math.fsum refuses infinities of both signs, which come to what is not a number."""
    return math.fsum(parts) if all(map(math.isfinite, parts)) else float(np.sum(parts))


def _gatherer(statistic: _Streamed, stream: TensorStream) -> _Gatherer:
    """Return what gathers ``statistic``."""
    ways = _Ways.of(stream.compute)
    if isinstance(statistic, ElementNorms):
        return _Norms(statistic, stream.compute, ways)
    if isinstance(statistic, ElementSums):
        return _Sums(statistic.count, ways)
    if isinstance(statistic, SingleSums):
        return _SingleSums(statistic.count, stream.size, ways)
    if isinstance(statistic, ColumnSums):
        return _Columns(statistic)
    return _Rows() if isinstance(statistic, RowValues) else _Sum(ways)
