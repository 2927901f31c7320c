"""How a tensor is cut into blocks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from mergefs.methods.contract import LONGEST_ROW

CONTENT_ELEMENTS: Final = 512 * 1024
"""Elements of the blocks whose hashes tensors are known by, 1 MiB of a 16 bit type. Identities follow from it, so it
never changes."""

BLOCK_ELEMENTS = CONTENT_ELEMENTS
"""Elements of the blocks that tensors are read, computed and bought by."""


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """A tensor of ``size`` elements cut into runs of ``step`` elements; the last run may be shorter.

    A run is as many whole rows (the last dimension) as fit into so many elements, and at least one; only a row of more
    than ``LONGEST_ROW`` elements is cut. The grid follows from the shape alone, so every model of a family has the same
    one, whatever its dtype and its shards.
    """

    size: int
    step: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "BlockGrid":
        """Return the grid of the blocks that a tensor of ``shape`` is read, computed and bought by."""
        return _grid(shape, BLOCK_ELEMENTS)

    @classmethod
    def of_contents(cls, shape: tuple[int, ...]) -> "BlockGrid":
        """Return the grid of the blocks whose hashes a tensor of ``shape`` is known by."""
        return _grid(shape, CONTENT_ELEMENTS)

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


@lru_cache(maxsize=1024)
def _grid(shape: tuple[int, ...], elements: int) -> BlockGrid:
    """Return the grid of a shape in blocks of so many elements: every block asks for one, and there are few shapes."""
    size = math.prod(shape)
    row = shape[-1] if shape else 1
    step = elements if row == 0 or row > LONGEST_ROW else max(1, elements // row) * row
    return BlockGrid(size, step)
