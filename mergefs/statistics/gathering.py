"""The one pass over a tensor of a family: hashes, block statistics and the histogram of every expert that lacks them.

Each block of an expert is read once. The base's block is read only where something needs it: where the base itself is
not known yet, or where an expert's block is another one by its hash.

An expert may be a copy of one that is known, which shows only at its end. So the first block that differs from the base
leads to the last tensor that had the same one there, a twin; as long as all blocks agree with the twin's, nothing but
hashes is taken. Should they part later, the blocks that were passed over are read again.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import ContentRecord, TwinRecord
from mergefs.checkpoint.dtypes import DType
from mergefs.errors import NonFiniteError
from mergefs.kernels.deltas import BlockMeasures, ReferenceMeter
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Raw, is_finite, load, store
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics import blocks, histograms
from mergefs.statistics.hashing import TensorHasher
from mergefs.statistics.identity import digest, local_key, sources_of, statistic_key

_BIN_OF_ZERO: Final = 0


class Meter(Protocol):
    """Measures the blocks of one tensor; see ``mergefs.kernels.deltas.ReferenceMeter``."""

    def measure(self, expert: Raw, base: Raw, start: int) -> BlockMeasures:
        """Return the measures of a block."""

    def squared_norm(self, values: Raw) -> float:
        """Return the squared norm of a block itself."""

    def histogram(self) -> NDArray[np.int64]:
        """Return the counts of magnitudes of all blocks so far."""


def meter(compute: DType) -> Meter:
    """Return the fastest meter for a compute dtype."""
    if compute not in FUSED_DTYPES:
        return ReferenceMeter(compute)
    from mergefs.kernels.fused.deltas import FusedMeter

    return FusedMeter(compute)


def analyze_tensor(
    base: Place, experts: tuple[Place, ...], compute: DType, catalog: Catalog, reader: SourceReader
) -> None:
    """Read one tensor of a family once and keep, at the next flush, what the catalog lacks.

    That is hashes and squared norms of ``base``, and hashes, block statistics and histograms of ``experts`` against it.
    Raises NonFiniteError naming the first tensor that holds a NaN or an infinity.
    """
    gathering = TensorGathering(base, experts, compute, catalog, reader)
    for block in range(gathering.grid.count):
        gathering.take(block)
    gathering.keep()


def hash_tensor(place: Place, catalog: Catalog, reader: SourceReader) -> None:
    """Read one tensor that has no deltas (integers, a model alone) and keep its hashes.

    Raises NonFiniteError naming it when it holds a NaN or an infinity.
    """
    hashing = TensorHashing(place, catalog)
    for start, stop in BlockGrid.of(place.shape):
        hashing.take(start, place.read(reader, start, stop, Purpose.ANALYSIS))
    hashing.keep()


class TensorGathering:
    """Gathers what ``analyze_tensor`` keeps, from blocks as they come, for who has their bytes in memory anyway.

    Each block of ``grid`` is taken once, from the first to the last; then all is kept. Nothing of it may be asked from
    several threads at a time.
    """

    def __init__(
        self, base: Place, experts: Sequence[Place], compute: DType, catalog: Catalog, reader: SourceReader
    ) -> None:
        self._base = _Base(base, compute, catalog, reader)
        self._experts = [_Expert(place, self._base, catalog) for place in experts]

    @property
    def grid(self) -> BlockGrid:
        """The blocks that are taken."""
        return self._base.grid

    def take(self, block: int, base: Raw | None = None, experts: Sequence[Raw | None] | None = None) -> None:
        """Take all that is to be known of a block.

        ``base`` and ``experts``, in the order of the experts, are its bytes as they are stored, None where they are to
        be read if they are needed. Raises NonFiniteError naming the tensor where they hold a NaN or an infinity.
        """
        self._base.begin(block, base)
        held = [None] * len(self._experts) if experts is None else experts
        for one, raw in zip(self._experts, held, strict=True):
            one.take(block, raw)

    def keep(self) -> None:
        """Keep what the catalog lacked, where it is found from its next flush on; all blocks have been taken."""
        content = self._base.keep()
        for one in self._experts:
            one.keep(content)


class TensorHashing:
    """Gathers what ``hash_tensor`` keeps, from blocks as they come."""

    def __init__(self, place: Place, catalog: Catalog) -> None:
        self._place = place
        self._catalog = catalog
        self._hasher = TensorHasher(place.dtype, place.shape)

    def take(self, start: int, raw: Raw) -> None:
        """Take the next block, whose first element has the flat index ``start``.

        Raises NonFiniteError naming the tensor where it holds a NaN or an infinity.
        """
        if self._place.dtype.is_float:
            refuse_non_finite(self._place, raw, start)
        self._hasher.take(raw)

    def keep(self) -> None:
        """Keep the hashes, which the catalog has from its next flush on; all blocks have been taken."""
        _keep_content(self._place, self._hasher.record(), self._catalog)


class _Base:
    """The base's tensor as it is gone through: its bytes where they are needed, and what is not known of it yet."""

    def __init__(self, place: Place, compute: DType, catalog: Catalog, reader: SourceReader) -> None:
        self.place = place
        self.compute = compute
        self.reader = reader
        self.grid = BlockGrid.of(place.shape)
        known = catalog.content(local_key(place))
        self.content = None if known is None else known.digest
        self.hashes: list[bytes] = [] if known is None else blocks.split_hashes(known)
        self._catalog = catalog
        self._hasher = TensorHasher(place.dtype, place.shape)
        self._norms: list[float] | None = None if blocks.known_norms(place, compute, catalog) is not None else []
        self._block = -1
        self._held: Raw | None = None
        self._values: Raw | None = None
        self._meter = meter(compute)

    def begin(self, block: int, held: Raw | None) -> None:
        """Go on to a block, whose bytes may be ``held``, and read it where something of it is not known."""
        self._block, self._held, self._values = block, held, None
        if self.content is not None and self._norms is None:
            return
        start, _ = self.grid.bounds(block)
        raw = self._read(block)
        self._values = in_dtype(raw, self.place.dtype, self.compute)
        norm = self._meter.squared_norm(self._values)
        if not np.isfinite(norm):  # or it may have become so in the compute dtype
            refuse_non_finite(self.place, raw, start)
        if self.content is None:
            self.hashes.append(self._hasher.take(raw))
        if self._norms is not None:
            self._norms.append(norm)

    def values(self, block: int) -> Raw:
        """Return the bytes of a block in the compute dtype."""
        if block != self._block:
            return in_dtype(self._read(block), self.place.dtype, self.compute)
        if self._values is None:
            self._values = in_dtype(self._read(block), self.place.dtype, self.compute)
        return self._values

    def keep(self) -> bytes:
        """Keep what was not known, and return the content."""
        if self.content is None:
            self.content = _keep_content(self.place, self._hasher.record(), self._catalog)
        if self._norms is not None:
            key = statistic_key("norms", self.compute, 0, (self.content,))
            about = _about(self.place, self.content, self._catalog)
            self._catalog.keep_norms(key, blocks.pack_norms(self._norms), about)
        return self.content

    def _read(self, block: int) -> Raw:
        """Return the bytes of a block as they are stored."""
        if block == self._block and self._held is not None:
            return self._held
        return self.place.read(self.reader, *self.grid.bounds(block), Purpose.ANALYSIS)


class _Expert:
    """An expert's tensor as it is gone through."""

    def __init__(self, place: Place, base: _Base, catalog: Catalog) -> None:
        self._place = place
        self._base = base
        self._catalog = catalog
        self._meter = meter(base.compute)
        self._record = catalog.content(local_key(place))
        self._known = None if self._record is None else blocks.split_hashes(self._record)
        self._hasher = TensorHasher(place.dtype, place.shape)
        self._hashes: list[bytes] = []
        self._measures: list[BlockMeasures | None] = [None] * base.grid.count
        self._unmeasured = 0  # elements in blocks that are the base's
        self._first: int | None = None  # block that is not the base's
        self._twin: list[bytes] | None = None

    def take(self, block: int, raw: Raw | None) -> None:
        """Take all that is to be known of a block, whose bytes may be in memory."""
        if self._known is None:
            raw = self._read(block) if raw is None else raw
            found = self._hasher.take(raw)
        else:
            found = self._known[block]
        self._hashes.append(found)
        if self._place.dtype == self._base.place.dtype and found == self._base.hashes[block]:
            start, stop = self._base.grid.bounds(block)
            self._unmeasured += stop - start
            return
        if self._first is None:
            self._first = block
            self._twin = self._find_twin(found)
        if self._twin is not None:
            if found == self._twin[block]:
                return
            self._part_from_twin(block)
        self._measure(block, self._read(block) if raw is None else raw)

    def keep(self, base: bytes) -> None:
        """Keep what was not known; ``base`` is the base's content."""
        content = _keep_content(self._place, self._record or self._hasher.record(), self._catalog)
        if content == base or self._twin is not None:
            return
        counts = self._meter.histogram()
        counts[_BIN_OF_ZERO] += self._unmeasured
        about = _about(self._place, content, self._catalog) + _about(self._base.place, base, self._catalog)
        delta_key, histogram_key = (
            statistic_key(kind, self._base.compute, 0, (content, base)) for kind in ("delta", "histogram")
        )
        self._catalog.keep_delta(delta_key, blocks.pack(blocks.BlockDeltas.of(self._measures)), about)
        self._catalog.keep_histogram(histogram_key, histograms.pack(counts), about)
        if self._first is not None:
            key = self._twin_key(base, self._first, self._hashes[self._first])
            self._catalog.keep_twin(key, TwinRecord(local_key(self._place)), about)

    def _find_twin(self, found: bytes) -> list[bytes] | None:
        """Return the hashes of a tensor whose statistics are known, and that may be this one."""
        if self._base.content is None or self._first is None:
            return None
        twin = self._catalog.twin(self._twin_key(self._base.content, self._first, found))
        content = None if twin is None else self._catalog.content(twin.local)
        if content is None:
            return None
        both = (content.digest, self._base.content)
        compute = self._base.compute
        if (
            self._catalog.delta(statistic_key("delta", compute, 0, both)) is None
            or self._catalog.histogram(statistic_key("histogram", compute, 0, both)) is None
        ):
            return None
        hashes = blocks.split_hashes(content)
        return hashes if hashes[: self._first] == self._hashes[: self._first] else None

    def _twin_key(self, base: bytes, block: int, found: bytes) -> bytes:
        """Return the key of the last tensor that had a block with the hash ``found`` where it left the base."""
        return digest("twin", self._place.dtype.name, base, block, found)

    def _part_from_twin(self, block: int) -> None:
        """Measure the blocks before this one after all."""
        self._twin = None
        for earlier in range(self._first or 0, block):
            if self._hashes[earlier] != self._base.hashes[earlier]:
                self._measure(earlier, self._read(earlier))

    def _measure(self, block: int, raw: Raw) -> None:
        """Measure a block whose stored bytes are ``raw``."""
        values = in_dtype(raw, self._place.dtype, self._base.compute)
        start, _ = self._base.grid.bounds(block)
        measured = self._meter.measure(values, self._base.values(block), start)
        if not np.isfinite(measured.largest):  # or it may have become so in the compute dtype
            refuse_non_finite(self._place, raw, start)
        self._measures[block] = measured

    def _read(self, block: int) -> Raw:
        """Return the bytes of a block as they are stored."""
        return self._place.read(self._base.reader, *self._base.grid.bounds(block), Purpose.ANALYSIS)


def in_dtype(raw: Raw, stored: DType, compute: DType) -> Raw:
    """Return bytes of elements of ``stored`` as bytes of ``compute``."""
    if stored == compute:
        return raw
    if stored in FUSED_DTYPES and compute in FUSED_DTYPES:
        from mergefs.kernels.fused.conversion import convert

        return convert(raw, stored, compute)
    with np.errstate(all="ignore"):
        return store(load(raw, stored, compute), compute, compute)


def refuse_non_finite(place: Place, raw: Raw, start: int) -> None:
    """Raise NonFiniteError where a block that begins at the flat index ``start`` holds a NaN or an infinity."""
    if is_finite(raw, place.dtype):
        return
    values: Array = load(raw, place.dtype, place.dtype)
    position = int(np.flatnonzero(~np.isfinite(values))[0])
    raise NonFiniteError(
        f"{place.describe()} holds {values[position]} at element {start + position}, and no merge of it can be right; "
        "repair the checkpoint or leave the model out"
    )


def _keep_content(place: Place, record: ContentRecord, catalog: Catalog) -> bytes:
    """Keep the hashes of a tensor, and return its content."""
    files = b"".join(map(local_key, place.stored()))
    catalog.keep_content(local_key(place), record, files)
    return record.digest


def _about(place: Place, content: bytes, catalog: Catalog) -> bytes:
    """Return what statistics of a place are about whose content has just been hashed and is not kept yet."""
    return content if isinstance(place, StoredTensor) else sources_of(catalog, place)
