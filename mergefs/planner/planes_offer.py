"""What delta planes would bring to a plan that has none, and what they would cost."""

from dataclasses import dataclass
from typing import Final

from mergefs.planner.plan import MergePlan
from mergefs.planner.stock import deltas_of
from mergefs.planner.strategy import Strategy
from mergefs.planner.workspace import Workspace

PLANES: Final = 4
"""A quarter of the bytes of 16 bit experts: what leaves less than a tenth of the merged delta where all are bought."""

_CODED_PER_SECOND: Final = 30e6
"""Elements times planes that one core codes in a second, as measured."""


@dataclass(frozen=True, slots=True)
class PlanesOffer:
    """``planes`` of each delta would take ``nbytes`` on disk and about ``core_seconds`` to make.

    With the same budget they would leave about ``relative_error`` of the merged delta: None where the method is not
    linear in the deltas, so that this must be tried, or the model so large that weighing it takes long.
    """

    planes: int
    nbytes: int
    core_seconds: float
    relative_error: float | None


def planes_offer(plan: MergePlan, workspace: Workspace) -> PlanesOffer | None:
    """Return what planes would bring to ``plan``; None where it has some, has no budget, or no delta can have any."""
    limit = plan.outcome.budget_bytes
    tensors = tuple(plan.tensors.values())
    if limit is None or plan.outcome.predicted_relative_error == 0 or any(tensor.coded for tensor in tensors):
        return None
    # Here, since most plans have no budget.
    from mergefs.planes.assumed import AssumedPlanes
    from mergefs.planes.coded import can_have_planes
    from mergefs.planner.selection import select_blocks
    from mergefs.planner.spending import MOST_ITEMS, items

    nbytes = elements = 0
    for tensor in tensors:
        for place, known in zip(tensor.places, deltas_of(tensor, workspace.catalog), strict=True):
            if known is not None and can_have_planes(place, tensor.stand_in):
                nbytes += AssumedPlanes.of(tensor.shape, known.squared_norms, PLANES).nbytes
                elements += place.elements
    if not nbytes:
        return None
    error = None
    if plan.outcome.predicted_by == "gram" and items(tensors) <= MOST_ITEMS:
        strategy = Strategy(assumed_planes=PLANES)
        error = select_blocks(
            tensors, workspace.catalog, workspace.statistics, limit, strategy
        ).predicted_relative_error
    return PlanesOffer(PLANES, nbytes, elements * PLANES / _CODED_PER_SECOND, error)
