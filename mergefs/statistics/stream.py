"""The tensors of all inputs of a merge as statistics of them see them: block after block, in tiles of whole rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw, load, store
from mergefs.methods.contract import LONGEST_ROW, Block, Quantity
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.sources.reader import SourceReader
from mergefs.statistics.order import Keys

_TILE: Final = 32 * 1024
"""Elements whose terms are computed at once: all arrays of them then stay in the second-level cache."""


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

    @property
    def grid(self) -> BlockGrid:
        """The blocks that are read."""
        return BlockGrid.of(self.places[0].shape)

    def blocks(self, quantities: Sequence[Quantity]) -> Iterator["StreamBlock"]:
        """Yield block after block of the inputs that quantities are about; each is read once."""
        models = sorted({model for quantity in quantities for model in quantity.models})
        for start, stop in self.grid:
            raws = {model: self.places[model].read(self.reader, start, stop, Purpose.ANALYSIS) for model in models}
            yield StreamBlock(self, start, stop, raws)

    def keys(self, quantity: Quantity) -> Iterator[tuple[int, Keys]]:
        """Yield for each tile its first flat index and the order keys of a quantity."""
        precision = _precision(self.compute)
        for block in self.blocks([quantity]):
            for tile in block.tiles([quantity]):
                with np.errstate(all="ignore"):
                    yield tile.start, precision.order_keys(tile.terms[0])


@dataclass(frozen=True, slots=True)
class Tile:
    """The terms of each quantity in a run of elements from ``start`` on, and whether that is the last of a block."""

    start: int
    terms: list[Array]
    ends_block: bool


@dataclass(frozen=True, slots=True)
class StreamBlock:
    """A block of some inputs: their bytes, as they are stored, from the flat index ``start`` to ``stop``."""

    stream: TensorStream
    start: int
    stop: int
    raws: dict[int, Raw]
    _converted: dict[int, Raw] = field(default_factory=dict, repr=False)

    def in_compute_dtype(self, model: int) -> Raw:
        """Return the bytes of one input in the compute dtype."""
        if model not in self._converted:
            self._converted[model] = _changed(self.raws[model], self.stream.places[model].dtype, self.stream.compute)
        return self._converted[model]

    def tiles(self, quantities: Sequence[Quantity]) -> Iterator[Tile]:
        """Yield the terms of each quantity for tile after tile."""
        shape = self.stream.places[0].shape
        for first, last in _bounds(self.start, self.stop, shape[-1] if shape else 1):
            yield Tile(first, self.terms(quantities, first, last), last == self.stop)

    def terms(self, quantities: Sequence[Quantity], first: int, last: int) -> list[Array]:
        """Return the terms of each quantity of the elements from the flat index ``first`` to ``last``."""
        precision = _precision(self.stream.compute)
        models = sorted({model for quantity in quantities for model in quantity.models})
        values = {model: self._load(model, first - self.start, last - self.start) for model in models}
        with np.errstate(all="ignore"):
            return [
                self._way(quantity)(Block(tuple(values[model] for model in quantity.models), first), precision)
                for quantity in quantities
            ]

    def _way(self, quantity: Quantity) -> Callable[[Block, Precision], Array]:
        """Return what computes the terms of a quantity."""
        if quantity.fused is None or self.stream.compute not in FUSED_DTYPES:
            return quantity.terms
        return quantity.fused

    def _load(self, model: int, first: int, last: int) -> Array:
        """Return the elements ``first`` to ``last`` of the block of one input."""
        dtype, compute = self.stream.places[model].dtype, self.stream.compute
        part = self.raws[model][first * dtype.itemsize : last * dtype.itemsize]
        with np.errstate(all="ignore"):
            if compute not in FUSED_DTYPES:
                return load(part, dtype, compute)
            from mergefs.kernels.fused.arrays import load as load_compiled

            return load_compiled(part, dtype, compute)


def _changed(raw: Raw, stored: DType, wanted: DType) -> Raw:
    """Return elements of ``stored`` as elements of ``wanted``."""
    if stored == wanted:
        return raw
    if stored in FUSED_DTYPES and wanted in FUSED_DTYPES:
        from mergefs.kernels.fused.conversion import convert

        return convert(raw, stored, wanted)
    with np.errstate(all="ignore"):
        return store(load(raw, stored, wanted), wanted, wanted)


def _bounds(start: int, stop: int, row: int) -> Iterator[tuple[int, int]]:
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
