"""Hashes of models that have not been analysed: what they are, and nothing of what they have in common."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import ContentRecord
from mergefs.checkpoint.checkpoint import TensorSource, WeightSource
from mergefs.checkpoint.source import Shard
from mergefs.processors import usable_processors
from mergefs.progress import Progress
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.learning import LearnedHashes
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.hashing import TensorHasher, record_of
from mergefs.statistics.identity import local_key

_FLUSH_BYTES: Final = 256 * 2**20


def identify(sources: Iterable[WeightSource], catalog: Catalog, reader: SourceReader, progress: Progress) -> None:
    """Make sure that the catalog has the hashes of every tensor of ``sources``, which then have identities by content.

    Whatever the tensors hold is hashed, be it NaN. What is done is kept every so often, so an interrupted run goes on
    where it was. Raises the errors of ``SourceReader.read``.
    """
    unknown = [
        place
        for source in sources
        for place in (StoredTensor(source.shards[tensor.shard], tensor) for tensor in source.tensors.values())
        if catalog.content(local_key(place)) is None
    ]
    if not unknown:
        return
    progress.start("hashing the inputs", sum(place.nbytes for place in unknown))
    unwritten = 0
    with ThreadPoolExecutor(max(2, usable_processors()), thread_name_prefix="hash") as pool:
        try:
            for place, record in zip(unknown, pool.map(lambda place: _hash(place, reader), unknown), strict=True):
                catalog.keep_content(local_key(place), record, local_key(place))
                progress.advance(place.nbytes)
                unwritten += place.nbytes
                if unwritten >= _FLUSH_BYTES:
                    catalog.flush()
                    unwritten = 0
        finally:
            pool.shutdown(cancel_futures=True)
            catalog.flush()
    progress.finish()


def learned_hashes(catalog: Catalog) -> LearnedHashes:
    """Return what takes the hashes of blocks that are read, and keeps those of whole tensors at the next flush.

    Where tensors are known by other blocks than they are read by, nothing is kept.
    """

    def keep(shard: Shard, tensor: TensorSource, hashes: Sequence[bytes]) -> None:
        record = record_of(tensor.dtype, tensor.shape, hashes)
        if record is not None:
            key = local_key(StoredTensor(shard, tensor))
            catalog.keep_content(key, record, key)

    return LearnedHashes(keep)


def _hash(place: StoredTensor, reader: SourceReader) -> ContentRecord:
    """Return the hashes of one tensor's blocks, and what it is known by."""
    hasher = TensorHasher(place.dtype, place.shape)
    for start, stop in BlockGrid.of(place.shape):
        hasher.take(place.read(reader, start, stop, Purpose.ANALYSIS))
    return hasher.record()
