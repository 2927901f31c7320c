"""The analysis pass over a family: hashes, block statistics and what methods ask for, only of what is not known yet.

All that is to be learned of a tensor is learned while its bytes are in memory, as far as that allows: so each model is
read once.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from mergefs.allocator import give_back_freed_memory
from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import CheckpointRecord
from mergefs.checkpoint.checkpoint import WeightSource
from mergefs.planner.analysis_tasks import Task, Tasks, tasks_of
from mergefs.planner.plan import TensorPlan
from mergefs.planner.workspace import Workspace
from mergefs.processors import usable_processors
from mergefs.progress import Progress
from mergefs.sources.place import StoredTensor
from mergefs.statistics.identity import checkpoint_identity, local_key

_FLUSH_BYTES = 256 * 2**20
_PROGRAM: Final = 256 * 2**20
"""Bytes that an analysis takes beside what it holds of tensors."""


def analyze_family(
    tensors: Sequence[TensorPlan], sources: Iterable[WeightSource], workspace: Workspace, progress: Progress
) -> dict[Path, int]:
    """Make sure that the catalog has the hashes of all ``sources``, and all statistics of ``tensors``.

    These are the block statistics, and what their methods ask for, so that no read has to gather it. What is done is
    kept every so often, so an interrupted analysis goes on where it was. Returns for each source, by its path, the
    bytes of tensors of which all hashes and block statistics were known before.
    """
    sources, catalog = tuple(sources), workspace.catalog
    # First of all, and on disk: statistics of models that nobody has told of are garbage to `mergefs catalog gc`.
    record_checkpoints(sources, catalog)
    catalog.flush()
    stored = {
        source.path: [StoredTensor(source.shards[t.shard], t) for t in source.tensors.values()] for source in sources
    }
    tasks = tasks_of(tensors, (place for places in stored.values() for place in places), catalog)
    known = {
        path: sum(place.nbytes for place in places if local_key(place) not in tasks.lacking)
        for path, places in stored.items()
    }
    total = sum(task.size for task in (*tasks.first, *tasks.last))
    if total:
        progress.start("analysing", total)
        try:
            _run(tasks, workspace, progress)
        finally:
            give_back_freed_memory()  # of what was held
        progress.finish()
    return known


def _run(tasks: Tasks, workspace: Workspace, progress: Progress) -> None:
    """Do all the work: tensors of files side by side, and then, one by one, those that take a computation to read."""
    catalog = workspace.catalog
    holding = workspace.reader.holding(max(0, workspace.planning_size - _PROGRAM) // 2)
    statistics = workspace.statistics.reading_by(holding)
    unwritten = 0

    def run(task: Task) -> None:
        if task.merged is None:  # then one pass is enough
            task.run(catalog, workspace.reader, statistics)
            return
        try:
            task.run(catalog, holding, statistics)
        finally:
            for place in task.places:
                for stored in place.stored():
                    holding.forget(stored.shard, stored.tensor)

    def finish(task: Task) -> None:
        nonlocal unwritten
        progress.advance(task.size)
        unwritten += task.size
        if unwritten >= _FLUSH_BYTES:
            catalog.flush()
            unwritten = 0

    for part in (tasks.first, tasks.last):
        _side_by_side([task for task in part if task.is_stored], run, finish)
        for task in part:
            if not task.is_stored:
                run(task)
                finish(task)
        catalog.flush()


def _side_by_side(tasks: Sequence[Task], run: Callable[[Task], None], finish: Callable[[Task], None]) -> None:
    """Run tasks in several threads, and finish them one by one in their order."""
    with ThreadPoolExecutor(max(2, usable_processors()), thread_name_prefix="analyze") as pool:
        try:
            for task, _ in zip(tasks, pool.map(run, tasks), strict=True):
                finish(task)
        finally:
            pool.shutdown(cancel_futures=True)


def record_checkpoints(sources: Iterable[WeightSource], catalog: Catalog) -> None:
    """Write down which models have been seen, and by which identity."""
    for checkpoint in sources:
        identity = checkpoint_identity(checkpoint, catalog)
        content = None if identity == checkpoint.local_identity else identity
        record = CheckpointRecord(str(checkpoint.path), len(checkpoint.tensors), checkpoint.total_bytes, content)
        catalog.keep_checkpoint(checkpoint.local_identity, record)
