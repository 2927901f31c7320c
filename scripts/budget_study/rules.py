"""Other rules to spend a budget by than the planner's, put into its plans: everything else stays as it is.

A rule says in which order (expert, block) pairs are taken. They are taken while they fit under the cap; one that no
longer fits is passed over, so no rule loses by a budget that is no multiple of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.catalog import Catalog
from mergefs.planner.levels import EQUAL, NOTHING, WHOLE, Selection, own_bytes
from mergefs.planner.plan import MergePlan, TensorPlan
from mergefs.sources.place import Role
from mergefs.statistics.blocks import known_deltas


@dataclass(frozen=True, slots=True)
class Piece:
    """What is bought together: a block of some experts, the bytes that it costs, and the squared norm of the deltas."""

    tensor: str
    block: int
    experts: tuple[int, ...]
    cost: int
    squared_norm: float


Rule = Callable[[Sequence[Piece]], list[Piece]]
"""From the pieces (a block of one expert each), in the order of the plan, to what is bought together, in order."""


def largest_norm(pieces: Sequence[Piece]) -> list[Piece]:
    """Take the blocks with the largest deltas first, whatever they weigh in the merge and cost."""
    return sorted(pieces, key=lambda piece: -piece.squared_norm)


def coin_flip(seed: int) -> Rule:
    """Return MergePipe's rule: blocks in the order of a hash of (tensor, block), each read of all experts."""

    def order(pieces: Sequence[Piece]) -> list[Piece]:
        together: dict[tuple[str, int], list[Piece]] = {}
        for piece in pieces:
            together.setdefault((piece.tensor, piece.block), []).append(piece)
        blocks = [
            Piece(
                tensor,
                block,
                tuple(expert for piece in group for expert in piece.experts),
                sum(piece.cost for piece in group),
                sum(piece.squared_norm for piece in group),
            )
            for (tensor, block), group in together.items()
        ]
        return sorted(blocks, key=lambda piece: blake3(f"{seed}\0{piece.tensor}\0{piece.block}".encode()).digest())

    return order


def spend_by(rule: Rule, plan: MergePlan, catalog: Catalog) -> MergePlan:
    """Return ``plan``, made for a budget, with what ``rule`` buys for the same cap in the place of what it bought."""
    limit = plan.outcome.budget_bytes
    if limit is None:
        raise ValueError("a plan without a budget has nothing to choose")
    blocks = {name: _Blocks(tensor, catalog) for name, tensor in plan.tensors.items() if tensor.context is not None}
    for piece in rule([piece for entry in blocks.values() for piece in entry.pieces()]):
        if piece.cost <= limit:
            limit -= piece.cost
            blocks[piece.tensor].levels[piece.experts, piece.block] = WHOLE
    tensors = {
        name: replace(tensor, selection=blocks[name].selection(), coded=()) if name in blocks else tensor
        for name, tensor in plan.tensors.items()
    }
    planned = sum(tensor.planned_expert_bytes for tensor in tensors.values())
    outcome = replace(plan.outcome, expert_bytes_planned=planned)
    return replace(plan, plan_id=f"study-{plan.plan_id}", tensors=tensors, outcome=outcome)


_UNKNOWN: Final = "{} has no block statistics"


class _Blocks:
    """The blocks of one tensor: what each expert's cost and hold, and how much of them is read."""

    def __init__(self, tensor: TensorPlan, catalog: Catalog) -> None:
        self._tensor = tensor
        shape = (len(tensor.places), tensor.grid.count)
        self.levels: NDArray[np.uint8] = np.full(shape, WHOLE, dtype=np.uint8)
        self._norms: NDArray[Any] = np.zeros(shape)
        for index, (place, role) in enumerate(zip(tensor.places, tensor.roles, strict=True)):
            if role is Role.EXPERT and tensor.stand_in is not None:
                deltas = known_deltas(place, tensor.stand_in, tensor.compute, catalog)
                if deltas is None:
                    raise ValueError(_UNKNOWN.format(place.describe()))
                self.levels[index] = np.where(deltas.changed == 0, EQUAL, NOTHING)
                self._norms[index] = deltas.squared_norms

    def pieces(self) -> list[Piece]:
        """Return what can be bought."""
        costs = [place.bytes_read(self._tensor.grid, Role.EXPERT) for place in self._tensor.places]
        return [
            Piece(self._tensor.name, int(b), (int(e),), int(costs[e][b]), float(self._norms[e, b]))
            for e, b in zip(*np.nonzero(self.levels == NOTHING), strict=True)
        ]

    def selection(self) -> Selection:
        """Return what has been bought."""
        grid, roles = self._tensor.grid, self._tensor.roles
        experts = np.array([role is Role.EXPERT for role in roles], dtype=np.bool_)
        computed = (self.levels[experts] == WHOLE).any(axis=0)
        return Selection.of_blocks(grid, self.levels, own_bytes(len(roles), grid.count), computed)
