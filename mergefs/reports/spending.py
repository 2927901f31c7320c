"""What a plan spends on each tensor of each expert, and what it leaves out there."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergefs.planner.levels import EQUAL, NOTHING, WHOLE
from mergefs.planner.plan import MergePlan, PlanInput, TensorPlan
from mergefs.planner.responses import response_of
from mergefs.planner.workspace import Workspace
from mergefs.sources.place import Place, Role, block_sizes
from mergefs.statistics.blocks import known_deltas


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes of experts, and squared norms of deltas as far as they move the output.

    ``total`` bytes are what the whole merge reads, ``planned`` what the plan does, ``free`` those that need not be read
    since the base or another expert has the same, ``read`` what really was read, None where that was not measured.
    ``energy`` is the squared norm of the whole delta, ``left`` that of what is left out of it; both are None where the
    catalog does not know them.
    """

    total: int = 0
    planned: int = 0
    free: int = 0
    read: int | None = None
    energy: float | None = 0.0
    left: float | None = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.total + other.total,
            self.planned + other.planned,
            self.free + other.free,
            other.read if self.read is None else self.read + (other.read or 0),
            None if self.energy is None or other.energy is None else self.energy + other.energy,
            None if self.left is None or other.left is None else self.left + other.left,
        )

    @property
    def bought(self) -> float | None:
        """The share of the bytes that is bought, or None where there are none."""
        return self.planned / self.total if self.total else None

    @property
    def error(self) -> float | None:
        """What is left out, relative to the delta (norms, not squares); None where that is not known."""
        if self.left == 0:
            return 0.0
        if self.left is None or not self.energy:
            return None
        return math.sqrt(self.left / self.energy)


@dataclass(frozen=True, slots=True)
class Spending:
    """What a plan spends on one tensor of one expert; ``expert`` is an index into ``experts(plan)``."""

    expert: int
    tensor: str
    shape: tuple[int, ...]
    amount: Amount


def experts(plan: MergePlan) -> tuple[PlanInput, ...]:
    """Return the inputs whose bytes a budget pays for, in the order of the recipe."""
    return tuple(entry for entry in plan.inputs if entry.role is Role.EXPERT)


def spendings(
    plan: MergePlan, workspace: Workspace, read: Mapping[str, Sequence[int]] | None = None
) -> tuple[Spending, ...]:
    """Return what ``plan`` spends, for each expert and each tensor that is read from it.

    ``read`` holds for tensors by name the bytes that were really read for
    each of their inputs.
    """
    owners = _owners(plan)
    found: list[Spending] = []
    for tensor in plan.tensors.values():
        for index, place in enumerate(tensor.places):
            owner = _owner(place, owners)
            if owner is None:
                continue
            # Without a budget nothing is left out, and nothing must be known to say so.
            within = plan.outcome.budget_bytes is not None
            energy, left = _energies(tensor, index, workspace) if within else (None, 0.0)
            amount = Amount(
                total=place.total_bytes_read(Role.EXPERT),
                planned=tensor.planned_bytes(index),
                free=_free(tensor, index),
                read=None if read is None else _entry(read.get(tensor.name), index),
                energy=energy,
                left=left,
            )
            found.append(Spending(owner, tensor.name, tensor.shape, amount))
    return tuple(found)


def total(entries: Iterable[Spending]) -> Amount:
    """Return the sum of ``entries``."""
    return sum((entry.amount for entry in entries), Amount())


def _owners(plan: MergePlan) -> Mapping[object, int]:
    """Return which expert pays for the bytes of a file, by its path."""
    return {
        shard.path: index
        for index, entry in enumerate(experts(plan))
        for source in entry.model.sources
        for shard in source.shards
    }


def _owner(place: Place, owners: Mapping[object, int]) -> int | None:
    """Return which expert an input of a tensor comes from, None where it costs no expert anything."""
    paid = next((stored for stored in place.stored() if stored.role is Role.EXPERT), None)
    return None if paid is None else owners.get(paid.shard.path)


def _entry(counts: Sequence[int] | None, index: int) -> int:
    return 0 if counts is None or index >= len(counts) else int(counts[index])


def _free(tensor: TensorPlan, index: int) -> int:
    """Return the bytes of one input that the base, or an earlier input, has alike."""
    selection, place = tensor.selection, tensor.places[index]
    if selection is None:
        return 0
    given = (selection.paid(index) != WHOLE) & (selection.levels[index] == WHOLE)
    alike = (selection.levels[index] == EQUAL) | given
    return int(place.bytes_read(selection.cells, Role.EXPERT)[alike].sum())


def _energies(tensor: TensorPlan, index: int, workspace: Workspace) -> tuple[float | None, float | None]:
    """Return how much the delta of one input moves a tensor, and how much of that is left out: squared norms."""
    response = response_of(tensor, workspace.statistics)
    if response is None:
        return 0.0, 0.0
    everything = tensor.selection is None or bool(tensor.selection.bought[index].all())
    deltas = None
    if tensor.stand_in is not None:
        deltas = known_deltas(tensor.places[index], tensor.stand_in, tensor.compute, workspace.catalog)
    if deltas is None:
        return None, 0.0 if everything else None
    factor = response.factors[index] ** 2 + response.spreads[index]
    norms = deltas.squared_norms.astype(np.float64)
    return factor * float(norms.sum()), 0.0 if everything else factor * _left(tensor, index, norms)


def _left(tensor: TensorPlan, index: int, norms: NDArray[np.float64]) -> float:
    """Return the squared norm of what is left out of the delta of one input; ``norms`` are those of its blocks."""
    selection = tensor.selection
    if selection is None:
        return 0.0
    levels = selection.levels[index]
    coded = tensor.coded[index] if tensor.coded else None
    if coded is None:
        # Of a block that is bought in part, what is missing counts by its elements.
        sizes = block_sizes(selection.cells)
        missing = np.where(levels == NOTHING, sizes, 0)
        first = np.arange(0, levels.size, selection.grid.step // selection.cell)
        shares = np.add.reduceat(missing, first) / np.add.reduceat(sizes, first) if levels.size else missing
        return float((norms * shares).sum())
    kept = coded.left[np.where(levels >= EQUAL, 0, levels), np.arange(levels.size)]
    return float(np.where(levels >= EQUAL, 0.0, kept.astype(np.float64)).sum())
