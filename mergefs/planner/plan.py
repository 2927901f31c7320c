"""What a plan is. Everything here is immutable; the engine computes bytes from it and from nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.checkpoint import Checkpoint
from mergefs.checkpoint.dtypes import DType
from mergefs.methods.contract import Method, TensorContext
from mergefs.recipe.model import Recipe
from mergefs.sources.blocks import BlockGrid
from mergefs.statistics.pair import Location


class Role(Enum):
    """How an input takes part, and so who pays for its bytes."""

    EXPERT = "expert"
    BASE = "base"


@dataclass(frozen=True, slots=True, eq=False)
class PlanInput:
    """One model of the recipe, opened. ``identity`` is that of its contents once known, else the local one."""

    reference: str
    checkpoint: Checkpoint
    role: Role
    identity: str


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Which blocks of one tensor are bought, under a budget.

    ``bought`` holds a row of booleans for each input; rows of the base are all true. ``read`` is ``bought`` without
    the blocks that equal the base's, which cost nothing and are never read. ``computed`` says for each block whether
    the kernel computes it; the other blocks are the base's.
    """

    bought: NDArray[np.bool_]
    read: NDArray[np.bool_]
    computed: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class TensorPlan:
    """How one tensor of the merged model comes to be.

    ``places`` says where the tensor lies in each input of the merge, ``stand_in`` where the bytes of a block that is
    not bought come from (the base, or what ``--base`` names). ``context`` is None for tensors that are copied from
    ``places[0]`` (integers, masks). ``selection`` is None when everything is read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    compute: DType
    places: tuple[Location, ...]
    roles: tuple[Role, ...]
    stand_in: Location | None
    context: TensorContext | None
    selection: Selection | None = None

    @property
    def grid(self) -> BlockGrid:
        """The blocks that the tensor is computed by."""
        return BlockGrid.of(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the merged tensor."""
        return self.grid.size * self.dtype.itemsize

    @property
    def expert_bytes(self) -> int:
        """Bytes that all experts hold of this tensor, as far as the merge reads them."""
        if self.context is None:
            return self.places[0].tensor.nbytes if self.roles[0] is Role.EXPERT else 0
        return sum(p.tensor.nbytes for p, role in zip(self.places, self.roles, strict=True) if role is Role.EXPERT)

    @property
    def base_bytes(self) -> int:
        """Bytes that one full read takes from the base."""
        if self.context is None:
            return 0 if self.roles[0] is Role.EXPERT else self.places[0].tensor.nbytes
        if Role.BASE in self.roles:
            return self.places[self.roles.index(Role.BASE)].tensor.nbytes
        if self.selection is None or self.stand_in is None:
            return 0
        needed: NDArray[np.bool_] = np.logical_not(self.selection.read.all(axis=0))
        return block_bytes(self.grid, needed, self.stand_in.tensor.dtype.itemsize)

    @property
    def planned_expert_bytes(self) -> int:
        """Bytes that one full read takes from the experts."""
        if self.selection is None:
            return self.expert_bytes
        return sum(self.planned_bytes(index) for index, role in enumerate(self.roles) if role is Role.EXPERT)

    def planned_bytes(self, index: int) -> int:
        """Bytes that one full read takes from the input at ``index``."""
        place = self.places[index].tensor
        if self.selection is None:
            return place.nbytes
        return block_bytes(self.grid, self.selection.read[index], place.dtype.itemsize)


def block_bytes(grid: BlockGrid, chosen: NDArray[np.bool_], itemsize: int) -> int:
    """Return the bytes of the chosen blocks at ``itemsize`` bytes for each element."""
    if not grid.count:
        return 0
    start, stop = grid.bounds(grid.count - 1)
    whole = int(np.count_nonzero(chosen[:-1])) * grid.step
    return (whole + (stop - start if chosen[-1] else 0)) * itemsize


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the merged model: its header bytes, and its tensors in order of offset."""

    name: str
    header: bytes
    tensors: tuple[str, ...]
    offsets: tuple[int, ...]  # of each tensor, from the start of the file
    size: int


@dataclass(frozen=True, slots=True)
class BudgetOutcome:
    """What a plan costs and what it leaves out. Bytes; errors are relative to the norm of the whole merged delta."""

    budget_bytes: int | None
    expert_bytes_total: int
    expert_bytes_planned: int
    base_bytes: int
    output_bytes: int
    blocks_total: int
    blocks_selected: int
    predicted_relative_error: float


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """The whole merged model as a plan."""

    plan_id: str
    recipe: Recipe
    method: Method[Any]
    inputs: tuple[PlanInput, ...]
    stand_in: PlanInput | None
    donor: Checkpoint
    tensors: Mapping[str, TensorPlan]
    files: tuple[OutputFile, ...]
    outcome: BudgetOutcome
    random_seed: int
    max_shard_size: int
    notes: tuple[str, ...]
    created_ns: int

    @property
    def all_inputs(self) -> tuple[PlanInput, ...]:
        """The inputs of the recipe, and the stand-in for what is not bought where it is not one of them."""
        return self.inputs if self.stand_in is None else (*self.inputs, self.stand_in)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The directories that bytes come from."""
        return tuple(entry.checkpoint.path for entry in self.all_inputs)
