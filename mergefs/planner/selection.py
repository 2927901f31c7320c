"""Which blocks to buy: the largest removal of expected squared error for each byte, under a hard cap.

Deltas of different experts and blocks are taken as orthogonal, so what an unread block leaves out is the square of its
expert's factor in the merge times the squared norm of its delta, and errors add up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.errors import BudgetError
from mergefs.planner.levels import EQUAL, NOTHING, WHOLE, Selection, own_bytes
from mergefs.planner.plan import TensorPlan
from mergefs.planner.responses import response_of
from mergefs.sources.place import Role
from mergefs.statistics.blocks import known_deltas
from mergefs.statistics.service import StatisticsService


@dataclass(frozen=True, slots=True)
class SelectionResult:
    """The tensors with their selections, and the relative error that is expected to remain."""

    tensors: tuple[TensorPlan, ...]
    predicted_relative_error: float


_WHOLE: Final = -1
"""In the place of a block: all blocks of an input that cannot be bought singly."""


@dataclass(frozen=True, slots=True)
class _Items:
    """All (expert, block) pairs that cost something, as parallel arrays."""

    tensor: NDArray[np.int32]
    model: NDArray[np.int16]
    block: NDArray[np.int32]
    cost: NDArray[np.int64]
    gain: NDArray[np.float64]


def select_blocks(
    tensors: Sequence[TensorPlan], catalog: Catalog, statistics: StatisticsService, limit: int
) -> SelectionResult:
    """Choose blocks for at most ``limit`` bytes; every delta must have its block statistics in the catalog.

    Raises BudgetError where ``limit`` cannot pay for what must be read from an expert.
    """
    tensors = [_copied_from_the_base(tensor) for tensor in tensors]
    gathered = [_Blocks(tensor, catalog, statistics) for tensor in tensors]
    items = _gather(gathered)
    chosen = _choose(items, _left_after_necessary(tensors, limit))
    for index in np.flatnonzero(chosen):
        gathered[items.tensor[index]].buy(int(items.model[index]), int(items.block[index]))
    complete = bool(chosen.all())
    selected = tuple(replace(blocks.tensor, selection=blocks.selection(complete)) for blocks in gathered)
    total = float(items.gain.sum())
    left = float(items.gain[~chosen].sum())
    return SelectionResult(selected, math.sqrt(left / total) if total > 0 else 0.0)


def _copied_from_the_base(tensor: TensorPlan) -> TensorPlan:
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


class _Blocks:
    """The blocks of one tensor: what each costs and is worth, and which are bought."""

    def __init__(self, tensor: TensorPlan, catalog: Catalog, statistics: StatisticsService) -> None:
        self.tensor = tensor
        shape = (len(tensor.places), tensor.grid.count)
        self._equal = np.zeros(shape, dtype=np.bool_)  # the base's bytes: never read
        self._paid = np.zeros(shape, dtype=np.bool_)  # read: bought, or free of charge
        self.costs: dict[int, NDArray[np.int64]] = {}
        self.gains: dict[int, NDArray[np.float64]] = {}
        response = response_of(tensor, statistics)
        if response is None or tensor.stand_in is None:
            return
        for model, (place, role) in enumerate(zip(tensor.places, tensor.roles, strict=True)):
            if role is not Role.EXPERT:
                continue
            deltas = known_deltas(place, tensor.stand_in, tensor.compute, catalog)
            if deltas is None:
                raise BudgetError(f"{place.describe()} has no block statistics; run `mergefs analyze` on the recipe")
            self._equal[model] = deltas.changed == 0
            costs = place.bytes_read(tensor.grid, Role.EXPERT)
            free = costs == 0 if place.divisible else np.full(costs.shape, not costs.any())
            self._paid[model] = free & ~self._equal[model]
            self.costs[model] = np.where(self._equal[model], 0, costs)
            weight = response.factors[model] ** 2 + response.spreads[model]
            self.gains[model] = weight * deltas.squared_norms.astype(np.float64)

    def buy(self, model: int, block: int) -> None:
        """Buy a block of one input, or with ``_WHOLE`` all of them."""
        if block == _WHOLE:
            self._paid[model] = ~self._equal[model]
        else:
            self._paid[model, block] = True

    def selection(self, complete: bool) -> Selection:
        """Return which blocks are bought, read and computed; ``complete`` says that all of every tensor are."""
        grid, inputs = self.tensor.grid, len(self.tensor.places)
        if self.tensor.context is None:
            return Selection.everything(grid, inputs)
        of_the_base = np.array([role is Role.BASE for role in self.tensor.roles], dtype=np.bool_)
        levels = np.where(self._equal, EQUAL, np.where(self._paid, WHOLE, NOTHING)).astype(np.uint8)
        levels[of_the_base] = WHOLE
        computed: NDArray[np.bool_] = np.full(grid.count, complete) | self._paid.any(axis=0)
        return Selection.of_blocks(grid, levels, own_bytes(inputs, grid.count), computed)


def _gather(gathered: Sequence[_Blocks]) -> _Items:
    """Return the items that cost something."""
    columns: list[list[NDArray[Any]]] = [[], [], [], [], []]
    for number, blocks in enumerate(gathered):
        for model, costs in blocks.costs.items():
            gains = blocks.gains[model]
            entries: list[NDArray[Any]]
            if blocks.tensor.places[model].divisible:
                wanted = np.flatnonzero(costs)
                entries = [wanted.astype(np.int32), costs[wanted], gains[wanted]]
            else:
                whole = blocks.tensor.places[model].total_bytes_read(Role.EXPERT)
                if whole == 0 or not costs.any():
                    continue
                entries = [np.array([_WHOLE], dtype=np.int32), np.array([whole]), np.array([gains.sum()])]
            size = entries[0].size
            columns[0].append(np.full(size, number, dtype=np.int32))
            columns[1].append(np.full(size, model, dtype=np.int16))
            for column, entry in zip(columns[2:], entries, strict=True):
                column.append(entry)
    kinds = (np.int32, np.int16, np.int32, np.int64, np.float64)
    arrays = [
        np.concatenate(column) if column else np.zeros(0, dtype=kind)
        for column, kind in zip(columns, kinds, strict=True)
    ]
    return _Items(*arrays)


def _choose(items: _Items, limit: int) -> NDArray[np.bool_]:
    """Take items in order of gain for each byte while they fit, then fill what is left with those that still fit."""
    order = np.argsort(-(items.gain / np.maximum(items.cost, 1)), kind="stable")
    spent = np.cumsum(items.cost[order])
    fitting = int(np.searchsorted(spent, limit, side="right"))
    chosen = np.zeros(items.cost.size, dtype=np.bool_)
    chosen[order[:fitting]] = True
    rest = limit - (int(spent[fitting - 1]) if fitting else 0)
    tail = order[fitting:]
    tail = tail[items.cost[tail] <= rest]
    for index in tail:
        cost = int(items.cost[index])
        if cost <= rest:
            chosen[index] = True
            rest -= cost
        if rest <= 0:
            break
    return chosen
