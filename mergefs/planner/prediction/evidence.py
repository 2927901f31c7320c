"""What the catalog knows of the merge of one tensor, before a budget is spent."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.errors import BudgetError
from mergefs.methods.contract import Response
from mergefs.planner.allocation.offers import correlations
from mergefs.planner.plan import TensorPlan
from mergefs.planner.responses import response_of
from mergefs.sources.place import Role, block_sizes
from mergefs.statistics.blocks import BlockDeltas, known_deltas, known_norms
from mergefs.statistics.service import StatisticsService


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of n inputs of a tensor of b blocks, and of the base or what stands in for one.

    ``energies`` (float64 [n, b]) are squared norms of the deltas, ``largest`` (float64 [n, b]) their largest
    magnitudes, and ``changed`` (int64 [n, b]) counts elements that differ from the base; all are 0 for the base itself.
    ``sketches`` (int8 [n, b, size]) tell the angles between deltas. ``base`` (float64 [b]) are squared norms of the
    base, None where they are not known; ``sizes`` (int64 [b]) count elements.
    """

    response: Response
    energies: NDArray[np.float64]
    largest: NDArray[np.float64]
    changed: NDArray[np.int64]
    sketches: NDArray[np.int8]
    base: NDArray[np.float64] | None
    sizes: NDArray[np.int64]

    @cached_property
    def correlations(self) -> NDArray[np.float32]:
        """Cosines between the deltas of each block (float32 [b, n, n]), estimated; those of the base are 0."""
        return correlations(list(self.sketches))


def evidence_of(tensor: TensorPlan, catalog: Catalog, statistics: StatisticsService) -> Evidence | None:
    """Return what is known of a tensor; None of one that is copied, or that nothing stands in for.

    Raises BudgetError where a delta has no block statistics.
    """
    response = response_of(tensor, statistics)
    if response is None or tensor.stand_in is None:
        return None
    deltas: list[BlockDeltas] = []
    for place, role in zip(tensor.places, tensor.roles, strict=True):
        if role is Role.BASE:
            deltas.append(BlockDeltas.unchanged(tensor.grid.count))
            continue
        found = known_deltas(place, tensor.stand_in, tensor.compute, catalog)
        if found is None:
            raise BudgetError(f"{place.describe()} has no block statistics; run `mergefs analyze` on the recipe")
        deltas.append(found)
    base = known_norms(tensor.stand_in, tensor.compute, catalog)
    return Evidence(
        response=response,
        energies=np.stack([delta.squared_norms for delta in deltas]).astype(np.float64),
        largest=np.stack([delta.largest for delta in deltas]).astype(np.float64),
        changed=np.stack([delta.changed for delta in deltas]).astype(np.int64),
        sketches=np.stack([delta.sketches for delta in deltas]),
        base=None if base is None else base.astype(np.float64),
        sizes=block_sizes(tensor.grid),
    )
