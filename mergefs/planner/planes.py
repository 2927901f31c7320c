"""Which deltas of a recipe can be kept in planes, and in which cells."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mergefs.checkpoint.checkpoint import WeightSource
from mergefs.planes.coded import can_have_planes
from mergefs.planes.encoding import DeltaTask
from mergefs.planes.layout import cells_per_block
from mergefs.planner.plan import TensorPlan
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.place import Role, StoredTensor


def delta_tasks(
    tensors: Sequence[TensorPlan], sources: Iterable[WeightSource], planes: int
) -> dict[str, list[DeltaTask]]:
    """Return for each expert, by the directory that its tensors lie in, how its deltas are coded in ``planes`` planes.

    The cells follow from the size of the base alone, so they are the same for all experts of a family.
    """
    cells = {path: count for source in sources for path, count in _cells(source).items()}
    tasks: dict[str, list[DeltaTask]] = {}
    for tensor in tensors:
        base = tensor.stand_in
        for place, role in zip(tensor.places, tensor.roles, strict=True):
            if (
                role is Role.EXPERT
                and tensor.context is not None
                and isinstance(place, StoredTensor)
                and isinstance(base, StoredTensor)
                and can_have_planes(place, base)
            ):
                task = DeltaTask(place, base, tensor.compute, planes, cells[base.shard.path])
                tasks.setdefault(str(place.shard.path.parent), []).append(task)
    return tasks


def _cells(source: WeightSource) -> dict[Path, int]:
    """Return how many cells each block of a model is cut into, for each of its files."""
    floats = (tensor for tensor in source.tensors.values() if tensor.dtype.is_float)
    count = cells_per_block(sum(BlockGrid.of(tensor.shape).count for tensor in floats))
    return {shard.path: count for shard in source.shards}
