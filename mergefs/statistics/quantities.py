"""Answers about quantities: sums, values of rows, thresholds and quantiles, by streaming over the blocks of a tensor.

numpy's own sums are used and not BLAS, whose order of summation depends on the CPU and on the threads.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.norms import PartialNorm, row_norms
from mergefs.kernels.precision import Array, Precision, load
from mergefs.kernels.sums import PartialSums
from mergefs.methods.contract import (
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

    def terms(self, quantities: Sequence[Quantity]) -> Iterator[tuple[int, list[Array]]]:
        """Yield for each block its first flat index and the terms of each quantity; each input is read once."""
        precision = Precision(self.compute)
        models = sorted({model for quantity in quantities for model in quantity.models})
        for start, stop in BlockGrid.of(self.places[models[0]].shape):
            values = {model: self._load(model, start, stop) for model in models}
            with np.errstate(all="ignore"):
                yield (
                    start,
                    [
                        self._way(quantity)(Block(tuple(values[model] for model in quantity.models), start), precision)
                        for quantity in quantities
                    ],
                )

    def keys(self, quantity: Quantity) -> Iterator[tuple[int, Keys]]:
        """Yield for each block its first flat index and the order keys of a quantity."""
        precision = Precision(self.compute)
        for start, (terms,) in self.terms([quantity]):
            with np.errstate(all="ignore"):
                yield start, precision.order_keys(terms)

    def _way(self, quantity: Quantity) -> Callable[[Block, Precision], Array]:
        """Return what computes the terms of a quantity."""
        return quantity.terms if quantity.fused is None or self.compute not in FUSED_DTYPES else quantity.fused

    def _load(self, model: int, start: int, stop: int) -> Array:
        """Return the elements ``start`` to ``stop`` of one input."""
        place = self.places[model]
        with np.errstate(all="ignore"):
            return load(place.read(self.reader, start, stop, Purpose.ANALYSIS), place.dtype, self.compute)


def answer_quantities(wanted: Sequence[AboutQuantity], stream: TensorStream) -> dict[AboutQuantity, Answer]:
    """Return the answers to ``wanted``: sums and rows from one pass, order statistics from some for each quantity."""
    gathering = {one: _gatherer(one, stream) for one in wanted if isinstance(one, _Streamed)}
    if gathering:
        for start, terms in stream.terms(list(gathering)):
            for gatherer, values in zip(gathering.values(), terms, strict=True):
                gatherer.add(start, values)
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
    """Adds up the terms of one statistic, block by block."""

    def add(self, start: int, terms: Array) -> None: ...
    def answer(self) -> Answer: ...


class _Sum:
    """Sums the elements of each block, then the blocks."""

    def __init__(self) -> None:
        self._parts: list[float] = []

    def add(self, start: int, terms: Array) -> None:
        """Add a block."""
        self._parts.append(float(terms.astype(np.float64).sum()))

    def answer(self) -> float:
        """Return the sum."""
        return _total(self._parts)


class _Sums:
    """Does the same for several quantities."""

    def __init__(self, count: int) -> None:
        self._parts: list[list[float]] = [[] for _ in range(count)]

    def add(self, start: int, terms: Array) -> None:
        """Add a block."""
        for parts, row in zip(self._parts, terms, strict=True):
            parts.append(float(row.astype(np.float64).sum()))

    def answer(self) -> Vector:
        """Return the sums."""
        return np.array([_total(parts) for parts in self._parts], dtype=np.float64)


class _SingleSums:
    """Carries the lanes of float32 sums from block to block."""

    def __init__(self, count: int, size: int) -> None:
        self._partial = PartialSums.begin(count, size)

    def add(self, start: int, terms: Array) -> None:
        """Add a block."""
        self._partial = self._partial.add(terms.astype(np.float32))

    def answer(self) -> Vector:
        """Return the sums."""
        return self._partial.finish().astype(np.float64)


class _Norms:
    """Carries the lanes of each norm from block to block."""

    def __init__(self, statistic: ElementNorms, compute: DType) -> None:
        self._dtype = F32 if statistic.widened else compute
        self._chunk = statistic.chunk
        self._filled = 0
        self._partial = [PartialNorm.begin()] * statistic.count
        self._finished: list[list[np.float32]] = [[] for _ in range(statistic.count)]

    def add(self, start: int, terms: Array) -> None:
        """Add a block, piece by piece where it reaches into other chunks."""
        size, first = terms.shape[1], 0
        while first < size:
            last = size if self._chunk is None else min(size, first + self._chunk - self._filled)
            pieces = [row[first:last].astype(np.float32) for row in terms]
            self._partial = [norm.add(piece, self._dtype) for norm, piece in zip(self._partial, pieces, strict=True)]
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
    """Puts the values of the rows of all blocks one after the other."""

    def __init__(self) -> None:
        self._parts: list[Vector] = []

    def add(self, start: int, terms: Array) -> None:
        """Add a block."""
        self._parts.append(terms.astype(np.float64))

    def answer(self) -> Vector:
        """Return the values."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=np.float64)


class _Columns:
    """Sums each column from its first element to its last."""

    def __init__(self, statistic: ColumnSums) -> None:
        self._totals: Array = np.zeros(statistic.columns, dtype=np.float32 if statistic.single else np.float64)

    def add(self, start: int, terms: Array) -> None:
        """Add a block, which may begin and end within a step along the first dimension."""
        columns = self._totals.size
        values = terms.astype(self._totals.dtype)
        first = start % columns
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
    if isinstance(statistic, ElementNorms):
        return _Norms(statistic, stream.compute)
    if isinstance(statistic, ElementSums):
        return _Sums(statistic.count)
    if isinstance(statistic, SingleSums):
        return _SingleSums(statistic.count, stream.size)
    if isinstance(statistic, ColumnSums):
        return _Columns(statistic)
    return _Rows() if isinstance(statistic, RowValues) else _Sum()
