"""The analysis pass over a family: hashes and block statistics of every tensor, only of what is not known yet."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import CheckpointRecord
from mergefs.checkpoint.checkpoint import WeightSource
from mergefs.planner.plan import TensorPlan
from mergefs.processors import usable_processors
from mergefs.progress import Progress
from mergefs.sources.place import Place, Role, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.blocks import deltas_are_known, known_norms
from mergefs.statistics.gathering import analyze_tensor, hash_tensor
from mergefs.statistics.identity import checkpoint_identity, local_key
from mergefs.statistics.service import StatisticsService

_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class _Work:
    """One tensor of a family: its base, whether that lacks anything itself, and the experts that lack something."""

    tensor: TensorPlan
    base: Place
    base_lacks: bool
    experts: tuple[Place, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """All that may be read."""
        return (self.base, *self.experts)

    @property
    def lacking(self) -> Iterator[StoredTensor]:
        """The tensors in files that something is not known of."""
        for place in self.places if self.base_lacks else self.experts:
            yield from place.stored()


def analyze_family(
    tensors: Sequence[TensorPlan],
    sources: Iterable[WeightSource],
    catalog: Catalog,
    reader: SourceReader,
    progress: Progress,
) -> dict[Path, int]:
    """Make sure that the catalog has the hashes of all ``sources`` and the block statistics of all ``tensors``.

    What is done is kept every so often, so an interrupted analysis goes on where it was. Returns for each source, by
    its path, the bytes of tensors of which everything was known before.
    """
    sources = tuple(sources)
    # First of all, and on disk: statistics of models that nobody has told of are garbage to `mergefs catalog gc`.
    record_checkpoints(sources, catalog)
    catalog.flush()
    work = _missing(tensors, catalog)
    covered = {local_key(place) for entry in work for place in entry.places}
    stored = {
        source.path: [StoredTensor(source.shards[t.shard], t) for t in source.tensors.values()] for source in sources
    }
    rest = [
        place
        for places in stored.values()
        for place in places
        if (key := local_key(place)) not in covered and catalog.content_digest(key) is None
    ]
    lacking = {local_key(place) for entry in work for place in entry.lacking} | set(map(local_key, rest))
    known = {
        path: sum(place.nbytes for place in places if local_key(place) not in lacking)
        for path, places in stored.items()
    }
    total = sum(place.nbytes for entry in work for place in entry.places) + sum(place.nbytes for place in rest)
    if total:
        progress.start("analysing", total)
        _analyze(work, rest, catalog, reader, progress)
        progress.finish()
    return known


def _analyze(
    work: Sequence[_Work], rest: Sequence[Place], catalog: Catalog, reader: SourceReader, progress: Progress
) -> None:
    """Do all the work: tensors of files side by side, and then, one by one, those that take a computation to read."""
    tasks = [_Task(catalog, reader, entry.places, entry) for entry in work] + [
        _Task(catalog, reader, (place,)) for place in rest
    ]
    stored = [task for task in tasks if task.is_stored]
    unwritten = 0
    with ThreadPoolExecutor(max(2, usable_processors()), thread_name_prefix="analyze") as pool:
        try:
            for task, _ in zip(stored, pool.map(_Task.run, stored), strict=True):
                unwritten = _advance(task.size, unwritten, catalog, progress)
        finally:
            pool.shutdown(cancel_futures=True)
    for task in tasks:
        if not task.is_stored:
            task.run()
            unwritten = _advance(task.size, unwritten, catalog, progress)
    catalog.flush()


@dataclass(frozen=True, slots=True)
class _Task:
    """One tensor to be gone through: with experts against a base where there is ``work``, else for its hashes alone."""

    catalog: Catalog
    reader: SourceReader
    places: tuple[Place, ...]
    work: _Work | None = None

    @property
    def size(self) -> int:
        """The most bytes that it takes."""
        return sum(place.nbytes for place in self.places)

    @property
    def is_stored(self) -> bool:
        """Whether all of it lies in files."""
        return all(isinstance(place, StoredTensor) for place in self.places)

    def run(self) -> None:
        """Go through it."""
        if self.work is None:
            hash_tensor(self.places[0], self.catalog, self.reader)
            return
        tensor = self.work.tensor
        tensor.prepare()
        analyze_tensor(self.work.base, self.work.experts, tensor.compute, self.catalog, self.reader)


def gather_statistics(tensors: Sequence[TensorPlan], service: StatisticsService, progress: Progress) -> None:
    """Make sure that the catalog has every statistic that methods ask for, so that no read has to gather one."""
    wanted = [
        (tensor, tensor.method, tensor.context)
        for tensor in tensors
        if tensor.method is not None and tensor.context is not None and tensor.method.statistics(tensor.context)
    ]
    total = sum(tensor.expert_bytes for tensor, *_ in wanted)
    if not total:
        return
    progress.start("gathering statistics", total)
    for tensor, method, context in wanted:
        tensor.prepare()
        service.all_answers(method, context, tensor.places)
        progress.advance(tensor.expert_bytes)
    progress.finish()


def record_checkpoints(sources: Iterable[WeightSource], catalog: Catalog) -> None:
    """Write down which models have been seen, and by which identity."""
    for checkpoint in sources:
        identity = checkpoint_identity(checkpoint, catalog)
        content = None if identity == checkpoint.local_identity else identity
        record = CheckpointRecord(str(checkpoint.path), len(checkpoint.tensors), checkpoint.total_bytes, content)
        catalog.keep_checkpoint(checkpoint.local_identity, record)


def _missing(tensors: Iterable[TensorPlan], catalog: Catalog) -> list[_Work]:
    """Return what is not known of the deltas of tensors, and of the norms of their bases; each once."""
    work = []
    begun: set[tuple[bytes, ...]] = set()
    for tensor in tensors:
        base, compute = tensor.stand_in, tensor.compute
        if tensor.context is None or base is None:
            continue
        about_base = (local_key(base), compute.name.encode())
        experts: dict[tuple[bytes, ...], Place] = {}
        for place, role in zip(tensor.places, tensor.roles, strict=True):
            key = (local_key(place), *about_base)
            if role is Role.EXPERT and key not in begun and not deltas_are_known(place, base, compute, catalog):
                experts[key] = place
        lacks = about_base not in begun and (
            catalog.content_digest(local_key(base)) is None or known_norms(base, compute, catalog) is None
        )
        if experts or lacks:
            begun |= {about_base, *experts}
            work.append(_Work(tensor, base, lacks, tuple(experts.values())))
    return work


def _advance(size: int, unwritten: int, catalog: Catalog, progress: Progress) -> int:
    """Report ``size`` bytes done, and write to the catalog when enough has gathered."""
    progress.advance(size)
    unwritten += size
    if unwritten < _FLUSH_BYTES:
        return unwritten
    catalog.flush()
    return 0
