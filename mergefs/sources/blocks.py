"""How a tensor is cut into blocks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mergefs.methods.contract import LONGEST_ROW

BLOCK_ELEMENTS = 512 * 1024


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """A tensor of ``size`` elements cut into runs of ``step`` elements; the last run may be shorter.

    A run is as many whole rows (the last dimension) as fit into ``BLOCK_ELEMENTS``, which is 1 MiB of a 16 bit type,
    and at least one; only a row of more than ``LONGEST_ROW`` elements is cut. The grid follows from the shape alone, so
    every model of a family has the same one, whatever its dtype and its shards.
    """

    size: int
    step: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "BlockGrid":
        """Return the grid for a tensor of ``shape``."""
        size = math.prod(shape)
        row = shape[-1] if shape else 1
        step = BLOCK_ELEMENTS if row == 0 or row > LONGEST_ROW else max(1, BLOCK_ELEMENTS // row) * row
        return cls(size, step)

    @property
    def count(self) -> int:
        """The number of blocks."""
        return -(-self.size // self.step)

    def bounds(self, block: int) -> tuple[int, int]:
        """Return the first flat index of ``block`` and the one after its last."""
        start = block * self.step
        return start, min(start + self.step, self.size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self.bounds(block) for block in range(self.count))
