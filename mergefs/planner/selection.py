"""What a budget buys: the largest removal of expected squared error for each byte, under a hard cap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergefs.catalog.catalog import Catalog
from mergefs.errors import BudgetError
from mergefs.planner.allocation import allocate
from mergefs.planner.everything import copied_from_the_base
from mergefs.planner.levels import Selection
from mergefs.planner.offering import TensorOffers
from mergefs.planner.plan import TensorPlan
from mergefs.planner.strategy import BY_WORTH, Strategy
from mergefs.sources.place import Role
from mergefs.statistics.service import StatisticsService


@dataclass(frozen=True, slots=True)
class SelectionResult:
    """The tensors with their selections, and the relative error that is expected to remain."""

    tensors: tuple[TensorPlan, ...]
    predicted_relative_error: float


def select_blocks(
    tensors: Sequence[TensorPlan],
    catalog: Catalog,
    statistics: StatisticsService,
    limit: int,
    strategy: Strategy = BY_WORTH,
    spill: Path | None = None,
) -> SelectionResult:
    """Choose what to read for at most ``limit`` bytes; every delta must have its block statistics in the catalog.

    ``strategy`` says what may be bought and what counts; what there is to choose from is kept in files in ``spill``, or
    in memory.
    Raises BudgetError where ``limit`` cannot pay for what must be read from an expert.
    """
    tensors = [copied_from_the_base(tensor) for tensor in tensors]
    offers = TensorOffers(tensors, catalog, statistics, strategy)
    allocation = allocate(offers, _left_after_necessary(tensors, limit), spill)
    selected = list(map(_whole, tensors))
    for number, levels in offers.bought(allocation.levels).items():
        stock = offers.stock(number)
        selection = stock.everything() if allocation.complete else stock.selection(levels)
        selected[number] = replace(tensors[number], selection=selection, coded=stock.planes_of(selection))
    error = math.sqrt(allocation.left / allocation.total) if allocation.total > 0 else 0.0
    return SelectionResult(tuple(selected), error)


def _whole(tensor: TensorPlan) -> TensorPlan:
    """Return the plan of a tensor of which everything is read."""
    return replace(tensor, selection=Selection.everything(tensor.grid, len(tensor.places)))


def _left_after_necessary(tensors: Sequence[TensorPlan], limit: int) -> int:
    """Return what is left of ``limit`` after the bytes of experts that every plan reads.

    These are tensors that only an expert has, and that must be copied whole, and what stands in for what is not
    bought where it is computed from experts itself.
    """
    for tensor in tensors:
        place = tensor.places[0] if tensor.context is None else tensor.stand_in
        necessary = 0 if place is None else place.total_bytes_read(Role.EXPERT)
        if place is None or necessary == 0:
            continue
        limit -= necessary
        if limit < 0:
            raise BudgetError(
                f"{place.describe()} must be read whole, since nothing stands in for it, and the budget falls {-limit} "
                "bytes short of that; raise the budget"
            )
    return limit
