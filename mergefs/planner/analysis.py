"""The analysis pass over a family: hashes and block statistics of every tensor, only of what is not known yet."""

from collections.abc import Iterable, Sequence

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import CheckpointRecord
from mergefs.checkpoint.checkpoint import WeightSource
from mergefs.planner.plan import TensorPlan
from mergefs.progress import Progress
from mergefs.sources.place import Place, Role, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.blocks import known_deltas, known_norms
from mergefs.statistics.gathering import analyze_tensor, hash_tensor
from mergefs.statistics.identity import checkpoint_identity, local_key
from mergefs.statistics.service import StatisticsService

_FLUSH_BYTES = 256 * 2**20


def analyze_family(
    tensors: Sequence[TensorPlan],
    sources: Iterable[WeightSource],
    catalog: Catalog,
    reader: SourceReader,
    progress: Progress,
) -> None:
    """Make sure that the catalog has the hashes of all ``sources`` and the block statistics of all ``tensors``.

    What is done is kept every so often, so an interrupted analysis goes on where it was.
    """
    work = [(tensor, places) for tensor in tensors if (places := _missing(tensor, catalog))]
    covered = {local_key(place) for _, places in work for place in places}
    rest = [
        place
        for source in sources
        for place in (StoredTensor(source.shards[tensor.shard], tensor) for tensor in source.tensors.values())
        if (key := local_key(place)) not in covered and catalog.content(key) is None
    ]
    total = sum(p.nbytes for _, places in work for p in places) + sum(p.nbytes for p in rest)
    if not total:
        return
    progress.start("analysing", total)
    unwritten = 0
    for tensor, places in work:
        tensor.prepare()
        analyze_tensor(places[0], places[1:], tensor.compute, catalog, reader)
        unwritten = _advance(sum(p.nbytes for p in places), unwritten, catalog, progress)
    for place in rest:
        hash_tensor(place, catalog, reader)
        unwritten = _advance(place.nbytes, unwritten, catalog, progress)
    catalog.flush()
    progress.finish()


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


def _missing(tensor: TensorPlan, catalog: Catalog) -> tuple[Place, ...]:
    """Return the base and the experts whose deltas are not known; nothing where all are, and the base's norms too."""
    if tensor.context is None or tensor.stand_in is None:
        return ()
    experts = [
        place
        for place, role in zip(tensor.places, tensor.roles, strict=True)
        if role is Role.EXPERT and known_deltas(place, tensor.stand_in, tensor.compute, catalog) is None
    ]
    if not experts and known_norms(tensor.stand_in, tensor.compute, catalog) is not None:
        return ()
    return (tensor.stand_in, *experts)


def _advance(size: int, unwritten: int, catalog: Catalog, progress: Progress) -> int:
    """Report ``size`` bytes done, and write to the catalog when enough has gathered."""
    progress.advance(size)
    unwritten += size
    if unwritten < _FLUSH_BYTES:
        return unwritten
    catalog.flush()
    return 0
