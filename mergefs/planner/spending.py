"""Spends a budget: by worth where a method is linear in the deltas, and else in the best of several ways.

A method that elects signs or looks for the largest elements may answer to coarse deltas, or to experts of which only
some are bought, as no formula says. So the ways to spend the budget are tried on it, and what they leave out is
measured by the method's own kernel; see ``mergefs.planner.prediction``.
"""

from collections.abc import Sequence
from typing import Final

from mergefs.planner.allocation import BYTES_OF_A_STEP
from mergefs.planner.plan import TensorPlan
from mergefs.planner.prediction.predicted import Prediction
from mergefs.planner.prediction.prediction import Predictor
from mergefs.planner.selection import select_blocks
from mergefs.planner.strategy import BY_WORTH, Strategy
from mergefs.planner.workspace import Workspace
from mergefs.sources.place import Role

_WITH_PLANES: Final = (
    BY_WORTH,
    Strategy(together=True),
    Strategy(fewest_planes=3),
    Strategy(planes=False),
    Strategy(planes=False, together=True),
    Strategy(planes=False, angles=False),
)
_WITHOUT_PLANES: Final = (BY_WORTH, Strategy(together=True), Strategy(angles=False))

_PROGRAM: Final = 256 * 2**20
"""What planning takes beside what it chooses from."""

MOST_ITEMS: Final = 400_000
"""Pairs of an expert and a block above which only one way is tried, since each takes seconds then."""


def spend(tensors: Sequence[TensorPlan], limit: int, workspace: Workspace) -> tuple[tuple[TensorPlan, ...], Prediction]:
    """Return the tensors with what to read of them for at most ``limit`` bytes, and what that is expected to leave out.

    Every delta must have its block statistics in the catalog. Raises BudgetError where it has not, or where ``limit``
    cannot pay for what must be read from an expert.
    """
    predictor = Predictor(workspace)
    needed = _PROGRAM + items(tensors) * BYTES_OF_A_STEP
    spill = workspace.catalog.path if needed > workspace.planning_size else None

    def tried(strategy: Strategy) -> tuple[tuple[TensorPlan, ...], Prediction]:
        selected = select_blocks(tensors, workspace.catalog, workspace.statistics, limit, strategy, spill).tensors
        return selected, predictor.predict(selected)

    best, found = tried(BY_WORTH)
    if found.how == "gram" or found.relative_error == 0 or items(tensors) > MOST_ITEMS:
        return best, found
    others = _WITH_PLANES if any(tensor.coded for tensor in best) else _WITHOUT_PLANES
    for strategy in others[1:]:
        selected, prediction = tried(strategy)
        if prediction.relative_error < found.relative_error:
            best, found = selected, prediction
    return best, found


def items(tensors: Sequence[TensorPlan]) -> int:
    """Return how many pairs of an expert and a block there are."""
    return sum(tensor.grid.count * tensor.roles.count(Role.EXPERT) for tensor in tensors)
