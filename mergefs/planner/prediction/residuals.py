"""What a selection leaves of each delta."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergefs.planner.levels import EQUAL, NOTHING, Selection
from mergefs.planner.plan import TensorPlan
from mergefs.sources.place import block_sizes


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """For n inputs and c cells: ``energies`` of the deltas (float64 [n, c]), and what is ``left`` of them unknown.

    ``coarse`` (bool [n, c]) says where planes are read: there the delta is known approximately, and elsewhere exactly
    or not at all. ``selection`` is what they follow from.
    """

    selection: Selection
    energies: NDArray[np.float64]
    left: NDArray[np.float64]
    coarse: NDArray[np.bool_]

    def by_block(self, cells: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sums over the cells of each block, along the last axis."""
        per_block = self.selection.grid.step // self.selection.cell
        if per_block == 1 or not cells.shape[-1]:
            return cells
        sums: NDArray[np.float64] = np.add.reduceat(cells, np.arange(0, cells.shape[-1], per_block), axis=-1)
        return sums

    def in_any_cell(self, cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return for each block whether something holds in any of its cells, along the last axis."""
        found: NDArray[np.bool_] = self.by_block(cells.astype(np.float64)) > 0
        return found

    @property
    def affected(self) -> NDArray[np.bool_]:
        """For each block, whether anything is missing that the full merge has, or is not computed."""
        missing: NDArray[np.bool_] = np.logical_not(self.selection.bought.all(axis=0)) | ~self.selection.computed
        return missing


def residuals_of(tensor: TensorPlan, selection: Selection, energies: NDArray[np.float64]) -> Residuals:
    """Return what ``selection`` leaves of deltas whose blocks have ``energies`` (float64 [n, b]).

    The energies of single cells are those of the planes, where there are some; else they are taken as equal within a
    block, element by element.
    """
    levels = selection.levels
    per_cell = _spread(tensor, selection, energies)
    left = np.where(levels == NOTHING, per_cell, 0.0)
    coarse = (levels != NOTHING) & (levels < EQUAL)
    for index, coded in enumerate(tensor.coded):
        if coded is not None and coarse[index].any():
            rows = np.minimum(levels[index], coded.planes)
            found = np.asarray(coded.left, dtype=np.float64)[rows, np.arange(rows.size)]
            left[index] = np.where(coarse[index], found, left[index])
    return Residuals(selection, per_cell, left, coarse)


def _spread(tensor: TensorPlan, selection: Selection, energies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the energies of cells."""
    if selection.cell == selection.grid.step:
        return energies
    per_block = selection.grid.step // selection.cell
    block = np.arange(selection.levels.shape[1]) // per_block
    shares = block_sizes(selection.cells) / block_sizes(selection.grid)[block]
    per_cell: NDArray[np.float64] = energies[:, block] * shares
    for index, coded in enumerate(tensor.coded):
        if coded is not None and coded.grid == selection.cells:
            per_cell[index] = coded.left[0]
    return per_cell
