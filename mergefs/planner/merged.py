"""A tensor that is itself the result of a merge: the input of a recipe that merges another recipe's result."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Raw
from mergefs.methods.registry import method_origin
from mergefs.planner.plan import TensorPlan
from mergefs.planner.workspace import MergedReader
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place, Role
from mergefs.sources.reader import SourceReader


@dataclass(frozen=True, slots=True, eq=False)
class MergedTensor(Place):
    """One tensor of the plan called ``title``; it is computed when it is read, and written nowhere."""

    title: str
    plan: TensorPlan
    computed_by: MergedReader = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """As the merge makes it."""
        return self.plan.shape

    @property
    def dtype(self) -> DType:
        """As the merge makes it."""
        return self.plan.dtype

    @property
    def parts(self) -> tuple[Place, ...]:
        """The inputs of the merge."""
        return self.plan.places

    @property
    def formula(self) -> bytes:
        """The method with everything that it knows of the tensor."""
        return merge_formula(self.plan)

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Compute the elements, on the account of the inputs of the merge."""
        return self.computed_by.read_elements(self.plan.name, start, stop, purpose)

    def bytes_read(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """The sum over the inputs of the merge."""
        total: NDArray[np.int64] = np.zeros(grid.count, dtype=np.int64)
        for place in self.plan.places:
            total += place.bytes_read(grid, role)
        return total

    def total_bytes_read(self, role: Role) -> int:
        """The sum over the inputs of the merge."""
        return sum(place.total_bytes_read(role) for place in self.plan.places)

    def prepare(self) -> None:
        """Gather the statistics of the merge, and of those that it merges the results of."""
        self.computed_by.prepare_tensor(self.plan.name)

    def describe(self) -> str:
        """Name the merge and the tensor."""
        return f"{self.title}: tensor {self.plan.name!r}"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with the kind of each, so that no two mean the same text."""
    return {name: [type(value).__name__, value] for name, value in values.items()}


def merge_formula(plan: TensorPlan) -> bytes:
    """Return the method that merges a tensor with everything that it knows of it but the contents of the inputs."""
    context = plan.context
    if plan.method is None or context is None:
        return b"copied"
    content = {
        "method": plan.method.specification.name,
        "origin": str(method_origin(plan.method.specification.name)),
        "tensor": context.name,
        "dtype": plan.dtype.name,
        "compute": plan.compute.name,
        "base": context.base,
        "shared": _plain(context.shared),
        "per_model": [_plain(values) for values in context.per_model],
        "seed": context.seed,
    }
    return b"merged " + json.dumps(content, sort_keys=True).encode()
