"""Where the bytes of coded deltas lie: cells, groups, and the record of a cell.

A *cell* is a run of elements that divides a block evenly into whole rows; it is coded on its own. A *group* is a run of
elements within a cell that share a scale. The record of a cell is

    exponent (1 byte, signed) | scale code of each group (1 byte) | plane 1 | check | plane 2 | check | ...

so that its first planes are a prefix of it, which one read gets. Elements of a group without scale (code 0: its delta
is zero) have no bits in the planes; a cell without any has no record at all. A check is the beginning of the BLAKE3
hash of all that stands before it, so one look at the last check that is read is enough.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.trellis import STATE_BITS
from mergefs.sources.blocks import BlockGrid

CHECK_BYTES: Final = 4
MOST_CELLS: Final = 131_072
"""Of one model, so that a plan weighs few of them; only where it has more blocks are there more."""

_MOST_CELLS_OF_A_BLOCK: Final = 16
_LONGEST_GROUP: Final = 512
_SHORTEST_GROUP: Final = 256


def cells_per_block(blocks: int) -> int:
    """Return how many cells each block is cut into, in a model of so many ``blocks``."""
    cells = _MOST_CELLS_OF_A_BLOCK
    while cells > 1 and cells * blocks > MOST_CELLS:
        cells //= 2
    return cells


def cell_grid(shape: tuple[int, ...], cells: int) -> BlockGrid:
    """Return the cells of a tensor: of each block ``cells``, or as many fewer as divide its rows evenly."""
    blocks = BlockGrid.of(shape)
    row = shape[-1] if shape else 1
    units = blocks.step // row if row and blocks.step % row == 0 else blocks.step
    while units % cells:
        cells -= 1
    return BlockGrid(blocks.size, blocks.step // cells)


def group_size(shape: tuple[int, ...]) -> int:
    """Return the elements that share a scale: a piece of a row, or several short rows."""
    row = shape[-1] if shape else 1
    if row > _LONGEST_GROUP:
        return -(-row // -(-row // _LONGEST_GROUP))
    return max(1, row) * max(1, _SHORTEST_GROUP // max(1, row))


@dataclass(frozen=True, slots=True, eq=False)
class RecordLayout:
    """The records of all cells of a tensor.

    ``coded`` (int64) says for each cell how many elements have bits in the planes.
    """

    grid: BlockGrid
    group: int
    coded: NDArray[np.int64]

    def prefix_bytes(self, planes: int, cells: range | None = None) -> NDArray[np.int64]:
        """Return for each cell, or each of ``cells``, the bytes of its record up to and with so many planes (int64)."""
        cells = range(self.grid.count) if cells is None else cells
        if planes == 0:
            return np.zeros(len(cells), dtype=np.int64)
        coded = self.coded[cells.start : cells.stop]
        groups = np.full(coded.size, -(-self.grid.step // self.group))
        if cells.stop == self.grid.count and coded.size:
            start, stop = self.grid.bounds(cells.stop - 1)
            groups[-1] = -(-(stop - start) // self.group)
        plane = (coded + (STATE_BITS - 1 + 7)) // 8 + CHECK_BYTES
        sizes: NDArray[np.int64] = np.where(coded > 0, 1 + groups + planes * plane, 0)
        return sizes
