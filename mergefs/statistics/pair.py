"""The stream that every statistic is gathered from: the blocks of one tensor of an expert and its base."""

from collections.abc import Iterator
from dataclasses import dataclass

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Array, Precision, load
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.sources.reader import SourceReader


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of an expert and the same tensor of its base, read block by block in a compute dtype."""

    expert: Place
    base: Place
    compute: DType
    reader: SourceReader

    @property
    def grid(self) -> BlockGrid:
        """The blocks that both are read by."""
        return BlockGrid.of(self.expert.shape)

    def deltas(self) -> Iterator[tuple[int, Array]]:
        """Yield for each block its first flat index and the delta, rounded to the compute dtype."""
        precision = Precision(self.compute)
        for start, stop in self.grid:
            expert, base = (
                load(location.read(self.reader, start, stop, Purpose.ANALYSIS), location.dtype, self.compute)
                for location in (self.expert, self.base)
            )
            yield start, precision.round(expert - base)
