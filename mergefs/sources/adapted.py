"""Tensors of a model with an adapter applied to it: the rows that are asked for, computed when they are.

The factors are small and every block needs them, so they are read once and kept; a budget pays for them once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.adapter_fit import AddedVector, Change, Fit, LowRank, SavedTensor
from mergefs.checkpoint.dtypes import F32, F64, DType
from mergefs.checkpoint.source import Shard
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.low_rank import Product, add_product, with_lengths
from mergefs.kernels.precision import Array, Precision, Raw, load, store
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place, Role, StoredTensor
from mergefs.sources.reader import SourceReader


def adapted_tensors(tensors: Mapping[str, Place], fit: Fit, shard: Shard, role: Role) -> dict[str, Place]:
    """Return the tensors of a model after the adapter in the file ``shard``, which ``fit`` has found places for.

    ``role`` says who pays for the bytes of the adapter.
    """
    result = dict(tensors)
    if fit.untied is not None:
        output, source = fit.untied
        result[output] = tensors[source]
    for name, changes in fit.changes.items():
        result[name] = adapted(result[name], changes, shard, role)
    return dict(sorted(result.items()))


def adapted(weight: Place, changes: tuple[Change, ...], shard: Shard, role: Role) -> Place:
    """Return ``weight`` after ``changes``, in their order, by the adapter in the file ``shard``."""
    place = weight
    for change in changes:
        if isinstance(change, LowRank):
            magnitude = () if change.magnitude is None else (StoredTensor(shard, change.magnitude, role),)
            factors = (StoredTensor(shard, change.a, role), StoredTensor(shard, change.b, role), *magnitude)
            place = AdaptedTensor(place, factors, change)
        elif isinstance(change, AddedVector):
            place = AdaptedBias(place, (StoredTensor(shard, change.vector, role),), change.scaling)
        elif isinstance(change, SavedTensor):
            saved = StoredTensor(shard, change.tensor, role)
            place = saved if saved.dtype == weight.dtype else ConvertedTensor(saved, weight.dtype)
        else:
            place = ReplacedRows(place, (StoredTensor(shard, change.rows, role),), change.indices)
    return place


class _WithAdditions(Place):
    """A tensor computed from ``weight``, of the same shape and type, and ``additions``, tensors of an adapter."""

    __slots__ = ()

    weight: Place
    additions: tuple[StoredTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.weight.shape

    @property
    def dtype(self) -> DType:
        """That of the weight."""
        return self.weight.dtype

    @property
    def parts(self) -> tuple[Place, ...]:
        """The weight and what is added to it."""
        return (self.weight, *self.additions)

    def bytes_read(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """The block of the weight; and what is read once and kept, on the account of the first block."""
        sizes: NDArray[np.int64] = self.weight.bytes_read(grid, role).copy()
        if sizes.size:
            sizes[0] += sum(part.total_bytes_read(role) for part in self.additions)
        return sizes

    @property
    def divisible(self) -> bool:
        """No: what is added costs the same for one block as for all."""
        return False

    def describe(self) -> str:
        """Name the weight, and a tensor of the adapter."""
        return f"{self.weight.describe()} with {self.additions[0].describe()}"


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedTensor(_WithAdditions):
    """A weight with the product of two factors added to it: ``additions`` are a, b and, for DoRA, the magnitude."""

    weight: Place
    additions: tuple[StoredTensor, ...]
    change: LowRank

    @property
    def formula(self) -> bytes:
        """The way in which the factors are read, multiplied and rounded."""
        change = self.change
        how = (change.stack, change.rank, change.inputs_first, float(change.scaling), change.rounds_delta)
        return f"low rank 1 {how!r}".encode()

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Compute the rows that hold the elements, each on its own and always in the same way."""
        if start >= stop:
            return np.empty(0, dtype=np.uint8)
        itemsize, columns = self.dtype.itemsize, self.change.columns
        first, last = start // columns, -(-stop // columns)
        within = slice((start - first * columns) * itemsize, (stop - first * columns) * itemsize)
        if self.change.magnitude is None:
            rows: Raw = np.zeros((last - first) * columns * itemsize, dtype=np.uint8)
            rows[within] = self.weight.read(reader, start, stop, purpose)
        else:
            rows = self.weight.read(reader, first * columns, last * columns, purpose)
        stored = tuple(part.read_kept(reader, purpose) for part in self.additions)
        pieces = []
        for matrix, begin, end in self._runs(first, last):
            at = matrix * self.change.rows + begin - first
            run = rows[at * columns * itemsize : (at + end - begin) * columns * itemsize]
            pieces.append(self._compute(run, stored, matrix, begin, end))
        result: Raw = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return result[within]

    def kernels(self) -> Iterator[tuple[str, DType]]:
        """Yield the kernel that adds a product; the sum whose rows DoRA measures is taken in float32."""
        yield "low_rank", self.dtype if self.change.magnitude is None else _carrier(self.dtype)
        yield from self.weight.kernels()

    def _runs(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return the rows ``first`` to ``last`` of the tensor as runs within a matrix: its number, and rows of it."""
        rows = self.change.rows
        return [
            (matrix, max(first - matrix * rows, 0), min(last - matrix * rows, rows))
            for matrix in range(first // rows, -(-last // rows))
        ]

    def _compute(self, weight: Raw, stored: tuple[Raw, ...], matrix: int, begin: int, end: int) -> Raw:
        """Return the rows ``begin`` to ``end`` of one matrix, from those of the weight."""
        product = self._product(stored[0], stored[1], matrix, begin, end)
        if self.change.magnitude is None:
            return _add(weight, self.dtype, product, self.change.rounds_delta)
        # The length of a row is that of the sum before it is rounded.
        carrier = _carrier(self.dtype)
        with np.errstate(all="ignore"):
            total = _add(store(load(weight, self.dtype, carrier), carrier, carrier), carrier, product, False)
            magnitude = self._values(stored[2].reshape(-1, self.additions[2].dtype.itemsize)[begin:end], 2)
            rows = load(total, carrier, carrier).reshape(end - begin, -1)
            return store(with_lengths(rows, magnitude).reshape(-1), carrier, self.dtype)

    def _product(self, a: Raw, b: Raw, matrix: int, begin: int, end: int) -> Product:
        """Return the product whose rows are ``begin`` to ``end`` of one matrix, from the bytes of both factors."""
        change = self.change
        size_a, size_b = (part.dtype.itemsize for part in self.additions[:2])
        ranks_by_inputs = a.reshape(change.stack, change.rank, change.inputs, size_a)[matrix]
        outputs_by_ranks = b.reshape(change.outputs, change.rank, change.stack, size_b)[:, :, matrix]
        if change.inputs_first:
            left = self._values(ranks_by_inputs[:, begin:end].swapaxes(0, 1), 0)
            return Product(left, self._values(outputs_by_ranks.swapaxes(0, 1), 1), change.scaling)
        return Product(self._values(outputs_by_ranks[begin:end], 1), self._values(ranks_by_inputs, 0), change.scaling)

    def _values(self, raw: Raw, part: int) -> Array:
        """Return elements of an addition, whose bytes are the last dimension of ``raw``, as values to multiply."""
        flat = np.ascontiguousarray(raw).reshape(-1)
        with np.errstate(all="ignore"):
            return load(flat, self.additions[part].dtype, _carrier(self.dtype)).reshape(raw.shape[:-1])


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedBias(_WithAdditions):
    """A bias with ``scaling`` times a vector added to it."""

    weight: Place
    additions: tuple[StoredTensor, ...]
    scaling: float

    @property
    def formula(self) -> bytes:
        """How much of the vector is added."""
        return f"bias 1 {float(self.scaling)!r}".encode()

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Compute the elements."""
        carrier = _carrier(self.dtype)
        (vector,) = self.additions
        itemsize = vector.dtype.itemsize
        added = vector.read_kept(reader, purpose)[start * itemsize : stop * itemsize]
        weight = load(self.weight.read(reader, start, stop, purpose), self.dtype, carrier)
        with np.errstate(all="ignore"):
            scaled = load(added, vector.dtype, carrier) * Precision(carrier).scalar(self.scaling)
            return store(weight + scaled, carrier, self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class ReplacedRows(_WithAdditions):
    """A matrix whose rows ``indices`` are others, rounded to its type."""

    weight: Place
    additions: tuple[StoredTensor, ...]
    indices: tuple[int, ...]

    @property
    def formula(self) -> bytes:
        """Which rows are others."""
        return f"rows 1 {self.indices!r}".encode()

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Read the matrix, and put the others over it."""
        data = self.weight.read(reader, start, stop, purpose)
        itemsize, columns = self.dtype.itemsize, self.shape[1]
        inside = [
            (n, row) for n, row in enumerate(self.indices) if row * columns < stop and (row + 1) * columns > start
        ]
        if inside:
            (rows,) = self.additions
            data = data.copy()
            others = _converted(rows.read_kept(reader, purpose), rows.dtype, self.dtype)
            for number, row in inside:
                begin, end = max(row * columns, start), min((row + 1) * columns, stop)
                skipped = number * columns - row * columns
                data[(begin - start) * itemsize : (end - start) * itemsize] = others[
                    (begin + skipped) * itemsize : (end + skipped) * itemsize
                ]
        return data


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedTensor(Place):
    """A tensor in another floating-point type."""

    tensor: Place
    target: DType

    @property
    def shape(self) -> tuple[int, ...]:
        """Unchanged."""
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        """The other type."""
        return self.target

    @property
    def parts(self) -> tuple[Place, ...]:
        """The tensor."""
        return (self.tensor,)

    @property
    def formula(self) -> bytes:
        """The type that it is rounded to."""
        return f"converted 1 {self.target.name}".encode()

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Read and round."""
        return _converted(self.tensor.read(reader, start, stop, purpose), self.tensor.dtype, self.target)

    def bytes_read(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """The block as it is stored."""
        return self.tensor.bytes_read(grid, role)

    def describe(self) -> str:
        """Name the tensor."""
        return self.tensor.describe()


def _carrier(dtype: DType) -> DType:
    """Return the type that PEFT computes in where it changes a tensor of ``dtype``."""
    return F64 if dtype == F64 else F32


def _converted(raw: Raw, stored: DType, wanted: DType) -> Raw:
    """Return elements rounded to another type."""
    with np.errstate(all="ignore"):
        return store(load(raw, stored, wanted), wanted, wanted)


def _add(weight: Raw, dtype: DType, product: Product, rounds_delta: bool) -> Raw:
    """Return ``weight``, the bytes of whole rows, with a product added to it."""
    if dtype in FUSED_DTYPES:
        from mergefs.kernels.fused.low_rank import add_product as add_product_fused

        return add_product_fused(weight, dtype, product, rounds_delta)
    shape = (product.left.shape[0], product.right.shape[1])
    with np.errstate(all="ignore"):
        values = add_product(load(weight, dtype, dtype).reshape(shape), product, Precision(dtype), rounds_delta)
        return store(values.reshape(-1), dtype, dtype)
