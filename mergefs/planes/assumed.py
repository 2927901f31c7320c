"""Planes that are not there, to say what they would bring."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.trellis_books import TYPICAL_ERRORS
from mergefs.planes.layout import RecordLayout, group_size
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.place import block_sizes


@dataclass(frozen=True, slots=True, eq=False)
class AssumedPlanes:
    """What ``CodedDelta`` would say of prices and errors of a delta, if it were coded: one cell for each block.

    ``left`` (float32, ``planes`` + 1 rows) are expected squared errors: what is typical, of the blocks' ``energies``.
    """

    planes: int
    layout: RecordLayout
    left: NDArray[np.float32]

    @classmethod
    def of(cls, shape: tuple[int, ...], squared_norms: NDArray[np.float32], planes: int) -> "AssumedPlanes":
        """Return the planes of a delta of ``shape`` whose blocks have these squared norms."""
        grid = BlockGrid.of(shape)
        coded = np.where(squared_norms > 0, block_sizes(grid), 0)
        shares = np.square(np.array(TYPICAL_ERRORS[: planes + 1], dtype=np.float32))
        return cls(planes, RecordLayout(grid, group_size(shape), coded), np.outer(shares, squared_norms))

    @property
    def grid(self) -> BlockGrid:
        """The blocks."""
        return self.layout.grid

    @property
    def energies(self) -> NDArray[np.float32]:
        """The squared norm of the delta of each block."""
        energies: NDArray[np.float32] = self.left[0]
        return energies

    @property
    def nbytes(self) -> int:
        """The bytes of all planes."""
        return int(self.bytes_read(self.planes).sum())

    def bytes_read(self, level: int) -> NDArray[np.int64]:
        """Return for each block the bytes that would be read for ``level`` (int64)."""
        return self.layout.prefix_bytes(level)
