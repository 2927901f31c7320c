"""Which bytes of each input the merge of one tensor reads, under a budget."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.checkpoint.source import SourceFile
from mergefs.kernels.precision import Raw
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.reader import SourceReader

NOTHING: Final = 0
"""The level of a cell that is not bought: the base's own bytes stand in for it."""

EQUAL: Final = 254
"""The level of a cell whose values are the base's: nothing is read, and nothing is missing."""

WHOLE: Final = 255
"""The level of a cell that is read from the expert itself."""


class Coded(Protocol):
    """The delta of one expert's tensor in bit planes: levels between ``NOTHING`` and ``EQUAL`` are numbers of them."""

    @property
    def file(self) -> SourceFile:
        """The file that the planes are read from."""

    @property
    def grid(self) -> BlockGrid:
        """The cells."""

    @property
    def planes(self) -> int:
        """How many planes there are."""

    @property
    def left(self) -> NDArray[np.float32]:
        """Levels x cells: the squared norm of what is missing of the delta; at level 0 that of the delta itself."""

    @property
    def digest(self) -> bytes:
        """What identifies everything that can be decoded."""

    def kernels(self) -> Iterator[tuple[str, DType]]:
        """Yield the modules of ``mergefs.kernels.fused`` that it is decoded with, each with a dtype."""

    def bytes_read(self, level: int) -> NDArray[np.int64]:
        """Return for each cell the bytes that reading so many planes takes."""

    def decode(self, reader: SourceReader, base_values: Raw, cells: range, level: int, purpose: Purpose) -> Raw:
        """Return the base's values of cells side by side, with so many planes of the delta, in the compute dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What is read of each input of one tensor.

    A block of ``grid`` consists of cells of ``cell`` elements, which divide ``grid.step``; without planes a cell is a
    block. ``levels`` (inputs x cells) says how much of each cell is read: ``NOTHING``, a number of planes, ``EQUAL`` or
    ``WHOLE``; cells of the base are ``WHOLE``. ``givers`` (inputs x blocks) says whose bytes an input has in a block:
    its own, or those of an earlier input that has the same, which are read once; both then have the same levels.
    ``computed`` says for each block whether the kernel computes it; the other blocks are the base's.
    """

    grid: BlockGrid
    cell: int
    levels: NDArray[np.uint8]
    givers: NDArray[np.int16]
    computed: NDArray[np.bool_]

    @classmethod
    def of_blocks(
        cls, grid: BlockGrid, levels: NDArray[np.uint8], givers: NDArray[np.int16], computed: NDArray[np.bool_]
    ) -> "Selection":
        """Return a selection whose cells are the blocks."""
        return cls(grid, grid.step, levels, givers, computed)

    @classmethod
    def everything(cls, grid: BlockGrid, inputs: int) -> "Selection":
        """Return the selection that reads all blocks of all inputs."""
        levels = np.full((inputs, grid.count), WHOLE, dtype=np.uint8)
        return cls.of_blocks(grid, levels, own_bytes(inputs, grid.count), np.ones(grid.count, dtype=np.bool_))

    @property
    def cells(self) -> BlockGrid:
        """The cells as a grid."""
        return BlockGrid(self.grid.size, self.cell)

    @property
    def bought(self) -> NDArray[np.bool_]:
        """For each input and block: whether nothing is missing of it."""
        return self._by_block(np.logical_and, self.levels >= EQUAL)

    @property
    def read(self) -> NDArray[np.bool_]:
        """For each input and block: whether any of the input's own bytes are read, in whatever form."""
        inputs = np.arange(self.givers.shape[0], dtype=np.int16)[:, np.newaxis]
        found = self._by_block(np.logical_or, (self.levels != NOTHING) & (self.levels != EQUAL))
        read: NDArray[np.bool_] = np.logical_and(found, self.givers == inputs)
        return read

    @property
    def leaning(self) -> NDArray[np.bool_]:
        """For each block: whether the base's bytes stand in for, or are part of, any cell of any input."""
        found = self._by_block(np.logical_or, self.levels != WHOLE)
        leaning: NDArray[np.bool_] = np.logical_or.reduce(found, axis=0)
        return leaning

    @property
    def complete(self) -> bool:
        """Whether the merge is what it would be if everything were read."""
        return bool((self.levels >= EQUAL).all() and self.computed.all())

    def cells_of(self, block: int) -> range:
        """Return the cells that a block consists of."""
        first = block * (self.grid.step // self.cell)
        return range(first, min(first + self.grid.step // self.cell, self.levels.shape[1]))

    def paid(self, index: int) -> NDArray[np.uint8]:
        """Return the levels of one input, ``NOTHING`` where another input's bytes are used."""
        own = np.repeat(self.givers[index] == index, self.grid.step // self.cell)[: self.levels.shape[1]]
        levels: NDArray[np.uint8] = np.where(own, self.levels[index], NOTHING)
        return levels

    def _by_block(self, combine: np.ufunc, cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Combine the cells of each block."""
        if self.cell == self.grid.step or not cells.size:
            return cells
        first = np.arange(0, cells.shape[1], self.grid.step // self.cell)
        combined: NDArray[np.bool_] = combine.reduceat(cells, first, axis=1)
        return combined


def own_bytes(inputs: int, blocks: int) -> NDArray[np.int16]:
    """Return the givers where every input has its own bytes."""
    return np.repeat(np.arange(inputs, dtype=np.int16)[:, np.newaxis], blocks, axis=1)
