"""In which order the cells of one tensor are worth buying."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergefs.planner.allocation.offers import Offer


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """For each cell of one tensor the states on the lower convex hull of cost and error, as steps from one to the next.

    The steps of cell c are those from ``starts[c]`` to ``starts[c + 1]``; each is worth less for a byte than the one
    before it, and after the last the error is as small as it gets.

    - ``slopes``: float64 [steps], removed error for each byte; never rising within a cell.
    - ``gains``: float64 [steps], removed error.
    - ``costs``: int64 [steps], bytes.
    - ``least``: int64 [steps], the fewest bytes for which any state of the cell improves on the one before the step.
    - ``states``: uint8 [steps, n], the level of every input after the step.
    """

    slopes: NDArray[np.float64]
    gains: NDArray[np.float64]
    costs: NDArray[np.int64]
    least: NDArray[np.int64]
    states: NDArray[np.uint8]
    starts: NDArray[np.int64]


def chains_of(offer: Offer) -> Chains:
    """Return the steps of every cell of ``offer``.

    Where cells are bought whole or not at all, and at most eight inputs have bytes of their own, the hull is that of
    all sets of inputs. Elsewhere it is that of one way from nothing to all, which goes on with whatever removes most
    error for its price; inputs that cancel each other may go on in pairs. A hull makes up for moves that are not worth
    much before others have been made.
    """
    from mergefs.planner.allocation.compiled import TENSOR_CHAINS

    return Chains(*TENSOR_CHAINS.compiled()(*_arrays(offer)))


def candidates_of(offer: Offer, cell: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint8]]:
    """Return the costs, the errors and the states (uint8 [candidates, n]) that the hull of a cell is that of."""
    from mergefs.planner.allocation.compiled import CELL_CANDIDATES

    costs, errors, states = CELL_CANDIDATES.compiled()(*_arrays(offer), cell)
    return costs, errors, states


def _arrays(offer: Offer) -> tuple[Any, ...]:
    """Return the arrays of ``offer`` as the kernels take them."""
    contiguous = np.ascontiguousarray
    return (
        contiguous(offer.factors, dtype=np.float64),
        contiguous(offer.spreads, dtype=np.float64),
        contiguous(offer.energies, dtype=np.float64),
        contiguous(offer.correlations, dtype=np.float32),
        contiguous(offer.givers, dtype=np.int16),
        contiguous(offer.is_open, dtype=np.bool_),
        contiguous(offer.prices, dtype=np.int64),
        contiguous(offer.shares, dtype=np.float32),
        contiguous(offer.unbought, dtype=np.float64),
        offer.cells_per_block,
    )
