"""The stream that every statistic is gathered from: the blocks of one tensor of one or two models."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mergefs.checkpoint.checkpoint import Checkpoint, TensorSource
from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Array, Precision, Raw, load
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.reader import SourceReader


@dataclass(frozen=True, slots=True)
class Location:
    """One tensor of one checkpoint: where its bytes are."""

    checkpoint: Checkpoint
    tensor: TensorSource

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.tensor.shape)

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Return the bytes of the elements ``start`` to ``stop``."""
        itemsize = self.tensor.dtype.itemsize
        shard = self.checkpoint.shards[self.tensor.shard]
        return reader.read(shard, self.tensor.offset + start * itemsize, (stop - start) * itemsize, purpose)

    def describe(self) -> str:
        """Name file and tensor, for messages."""
        return f"{self.checkpoint.shards[self.tensor.shard].path}: tensor {self.tensor.name!r}"


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of an expert and the same tensor of its base, read block by block in a compute dtype."""

    expert: Location
    base: Location
    compute: DType
    reader: SourceReader

    @property
    def grid(self) -> BlockGrid:
        """The blocks that both are read by."""
        return BlockGrid.of(self.expert.tensor.shape)

    def deltas(self) -> Iterator[tuple[int, Array]]:
        """Yield for each block its first flat index and the delta, rounded to the compute dtype."""
        precision = Precision(self.compute)
        for start, stop in self.grid:
            expert, base = (
                load(location.read(self.reader, start, stop, Purpose.ANALYSIS), location.tensor.dtype, self.compute)
                for location in (self.expert, self.base)
            )
            yield start, precision.round(expert - base)
