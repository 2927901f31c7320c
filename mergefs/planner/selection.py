"""Which blocks to buy: the largest removal of expected squared error for each byte, under a hard cap.

Deltas of different experts and blocks are taken as orthogonal, so what an unread block leaves out is the square of its
expert's sensitivity times the squared norm of its delta, and errors add up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.errors import BudgetError
from mergefs.methods.contract import Method
from mergefs.planner.plan import Role, Selection, TensorPlan
from mergefs.statistics.blocks import known_deltas


@dataclass(frozen=True, slots=True)
class SelectionResult:
    """The tensors with their selections, and the relative error that is expected to remain."""

    tensors: tuple[TensorPlan, ...]
    predicted_relative_error: float


@dataclass(frozen=True, slots=True)
class _Items:
    """All (expert, block) pairs that cost something, as parallel arrays."""

    tensor: NDArray[np.int32]
    model: NDArray[np.int16]
    block: NDArray[np.int32]
    cost: NDArray[np.int64]
    gain: NDArray[np.float64]


def select_blocks(tensors: Sequence[TensorPlan], method: Method[Any], catalog: Catalog, limit: int) -> SelectionResult:
    """Choose blocks for at most ``limit`` bytes; every delta must have its block statistics in the catalog.

    Raises BudgetError where ``limit`` cannot pay for what must be copied from an expert.
    """
    tensors = [_copied_from_the_base(tensor) for tensor in tensors]
    items, free = _gather(tensors, method, catalog)
    chosen = _choose(items, _left_after_copies(tensors, limit))
    bought = [np.zeros((len(t.places), t.grid.count), dtype=np.bool_) for t in tensors]
    for index in np.flatnonzero(chosen):
        bought[items.tensor[index]][items.model[index], items.block[index]] = True
    complete = bool(chosen.all())
    selected = tuple(
        replace(tensor, selection=_selection(tensor, bought[index], free[index], complete))
        for index, tensor in enumerate(tensors)
    )
    total = float(items.gain.sum())
    left = float(items.gain[~chosen].sum())
    return SelectionResult(selected, math.sqrt(left / total) if total > 0 else 0.0)


def _copied_from_the_base(tensor: TensorPlan) -> TensorPlan:
    """Return the plan of a copied tensor with the stand-in in the place of an expert: all models have it alike."""
    if tensor.context is not None or tensor.stand_in is None:
        return tensor
    return replace(tensor, places=(tensor.stand_in,), roles=(Role.BASE,))


def _left_after_copies(tensors: Sequence[TensorPlan], limit: int) -> int:
    """Return what is left of ``limit`` after the tensors that only an expert has, and that must be copied whole."""
    for tensor in tensors:
        if tensor.context is not None or tensor.expert_bytes == 0:
            continue
        limit -= tensor.expert_bytes
        if limit < 0:
            raise BudgetError(
                f"{tensor.places[0].describe()} must be copied whole, since what stands in for the experts has no such "
                f"tensor, and the budget falls {-limit} bytes short of that; raise the budget"
            )
    return limit


def _gather(
    tensors: Sequence[TensorPlan], method: Method[Any], catalog: Catalog
) -> tuple[_Items, list[NDArray[np.bool_]]]:
    """Return the items that cost something, and for each tensor which blocks of which input equal the base's."""
    columns: list[list[NDArray[Any]]] = [[], [], [], [], []]
    free: list[NDArray[np.bool_]] = []
    for number, tensor in enumerate(tensors):
        grid = tensor.grid
        equal = np.zeros((len(tensor.places), grid.count), dtype=np.bool_)
        free.append(equal)
        if tensor.context is None:
            continue
        sensitivity = method.sensitivity(tensor.context)
        sizes = np.full(grid.count, grid.step, dtype=np.int64)
        if grid.count:
            start, stop = grid.bounds(grid.count - 1)
            sizes[-1] = stop - start
        for model, (place, role) in enumerate(zip(tensor.places, tensor.roles, strict=True)):
            if role is not Role.EXPERT or tensor.stand_in is None:
                continue
            deltas = known_deltas(place, tensor.stand_in, tensor.compute, catalog)
            if deltas is None:
                raise BudgetError(f"{place.describe()} has no block statistics; run `mergefs analyze` on the recipe")
            equal[model] = deltas.changed == 0
            blocks = np.flatnonzero(~equal[model])
            columns[0].append(np.full(blocks.size, number, dtype=np.int32))
            columns[1].append(np.full(blocks.size, model, dtype=np.int16))
            columns[2].append(blocks.astype(np.int32))
            columns[3].append(sizes[blocks] * place.tensor.dtype.itemsize)
            columns[4].append(sensitivity[model] ** 2 * deltas.squared_norms[blocks].astype(np.float64))
    kinds = (np.int32, np.int16, np.int32, np.int64, np.float64)
    arrays = [
        np.concatenate(column) if column else np.zeros(0, dtype=kind)
        for column, kind in zip(columns, kinds, strict=True)
    ]
    return _Items(*arrays), free


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


def _selection(tensor: TensorPlan, paid: NDArray[np.bool_], free: NDArray[np.bool_], complete: bool) -> Selection:
    """Return the selection of one tensor from the blocks that are paid for and those that are free."""
    base_rows = np.array([role is Role.BASE for role in tensor.roles], dtype=np.bool_)
    bought = paid | free
    bought[base_rows] = True
    read = paid.copy()
    read[base_rows] = True
    if tensor.context is None:
        everything = np.ones_like(bought)
        return Selection(everything, everything, np.ones(tensor.grid.count, dtype=np.bool_))
    computed: NDArray[np.bool_] = np.full(tensor.grid.count, complete) | paid.any(axis=0)
    return Selection(bought, read, computed)
