"""What a budget buys: the largest removal of expected squared error for each byte, under a hard cap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mergefs.catalog.catalog import Catalog
from mergefs.errors import BudgetError
from mergefs.planner.allocation import allocate
from mergefs.planner.levels import Selection
from mergefs.planner.offering import TensorOffers
from mergefs.planner.plan import TensorPlan
from mergefs.planner.stock import all_blocks_differ, deltas_of, stock_of
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


def select_everything(tensors: Sequence[TensorPlan], catalog: Catalog) -> tuple[TensorPlan, ...]:
    """Return the tensors, all read, but that blocks are not which are known to be the base's, or another input's.

    Nothing needs to be known, and a tensor of which nothing useful is stays without a selection.
    """
    return tuple(map(partial(_everything, catalog=catalog), tensors))


def _everything(tensor: TensorPlan, catalog: Catalog) -> TensorPlan:
    """Return the plan of a tensor that reads every byte that differs from the base's, and none twice."""
    if tensor.context is None or all_blocks_differ(tensor, catalog):
        return tensor
    stock = stock_of(tensor, deltas_of(tensor, catalog), catalog)
    return replace(tensor, selection=stock.everything()) if stock.saves else tensor


def _whole(tensor: TensorPlan) -> TensorPlan:
    """Return the plan of a tensor of which everything is read."""
    return replace(tensor, selection=Selection.everything(tensor.grid, len(tensor.places)))


def copied_from_the_base(tensor: TensorPlan) -> TensorPlan:
    """Return the plan of a copied tensor with the stand-in in the place of an expert: all models have it alike."""
    if tensor.context is not None or tensor.stand_in is None:
        return tensor
    return replace(tensor, places=(tensor.stand_in,), roles=(Role.BASE,))


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
