"""Block statistics: how much each block of an expert differs from the base, and what its bytes are."""

from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import ContentRecord, DeltaRecord
from mergefs.checkpoint.dtypes import DType
from mergefs.errors import NonFiniteError
from mergefs.kernels.precision import Array, Raw, is_finite, load
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place, StoredTensor
from mergefs.sources.reader import SourceReader
from mergefs.statistics.identity import KEY_BYTES, digest, local_key, sources_of, tensor_keys


@dataclass(frozen=True, slots=True)
class BlockDeltas:
    """Of each block of one expert's tensor: the squared norm of the delta, and how many elements differ in any bit."""

    squared_norms: NDArray[np.float32]
    changed: NDArray[np.uint32]


def delta_keys(expert: Place, base: Place, compute: DType, catalog: Catalog) -> list[bytes]:
    """Return the keys that the block statistics of a delta may be kept under, the best first."""
    options = [tensor_keys(place, catalog) for place in (expert, base)]
    both = dict.fromkeys((tuple(keys[0] for keys in options), tuple(keys[-1] for keys in options)))
    return [digest("delta", compute.name, *keys) for keys in both]


def known_deltas(expert: Place, base: Place, compute: DType, catalog: Catalog) -> BlockDeltas | None:
    """Return the block statistics from the catalog, or None; of a tensor that is the base's they are known anyway."""
    if expert.dtype == base.dtype and set(tensor_keys(expert, catalog)) & set(tensor_keys(base, catalog)):
        count = BlockGrid.of(base.shape).count
        return BlockDeltas(np.zeros(count, dtype=np.float32), np.zeros(count, dtype=np.uint32))
    for key in delta_keys(expert, base, compute, catalog):
        record = catalog.delta(key)
        if record is not None:
            return BlockDeltas(
                np.frombuffer(record.squared_norms, dtype="<f4"), np.frombuffer(record.changed, dtype="<u4")
            )
    return None


def analyze_tensor(
    places: tuple[Place, ...], base: int, compute: DType, catalog: Catalog, reader: SourceReader
) -> None:
    """Read one tensor of a family once and keep its hashes and, against ``places[base]``, its block statistics.

    Raises NonFiniteError naming the first tensor that holds a NaN or an infinity.
    """
    grid = BlockGrid.of(places[base].shape)
    norms = np.zeros((len(places), grid.count), dtype=np.float32)
    changed = np.zeros((len(places), grid.count), dtype=np.uint32)
    hashers = [_ContentHasher() for _ in places]
    for block, (start, stop) in enumerate(grid):
        raws = [place.read(reader, start, stop, Purpose.ANALYSIS) for place in places]
        values = [load(raw, place.dtype, compute) for raw, place in zip(raws, places, strict=True)]
        for index, (raw, hasher) in enumerate(zip(raws, hashers, strict=True)):
            hasher.update(raw)
            dtype = places[index].dtype
            if not is_finite(raw, dtype):
                raise _non_finite(places[index], load(raw, dtype, dtype), start)
            if index != base:
                delta = values[index].astype(np.float64) - values[base]
                norms[index, block] = np.float32((delta * delta).sum())
                bits = f"u{delta.dtype.itemsize}" if compute.bits == 64 else "u4"
                changed[index, block] = np.count_nonzero(values[index].view(bits) != values[base].view(bits))
    for place, hasher in zip(places, hashers, strict=True):
        catalog.keep_content(local_key(place), hasher.record(), _files_of(place))
    digests = [hasher.record().digest for hasher in hashers]
    for index in range(len(places)):
        if index != base:
            key = digest("delta", compute.name, digests[index], digests[base])
            about = b"".join(_sources_of(places[at], digests[at], catalog) for at in (index, base))
            catalog.keep_delta(
                key,
                DeltaRecord(norms[index].astype("<f4").tobytes(), changed[index].astype("<u4").tobytes()),
                about,
            )


def hash_tensor(place: Place, catalog: Catalog, reader: SourceReader) -> None:
    """Read one tensor that has no deltas (integers, a model alone) and keep its hashes.

    Raises NonFiniteError naming it when it holds a NaN or an infinity.
    """
    hasher = _ContentHasher()
    dtype = place.dtype
    for start, stop in BlockGrid.of(place.shape):
        raw = place.read(reader, start, stop, Purpose.ANALYSIS)
        if dtype.is_float and not is_finite(raw, dtype):
            raise _non_finite(place, load(raw, dtype, dtype), start)
        hasher.update(raw)
    catalog.keep_content(local_key(place), hasher.record(), _files_of(place))


def _files_of(place: Place) -> bytes:
    """Return the local keys of the tensors in files that ``place`` is made of: what its hashes are about."""
    return b"".join(map(local_key, place.stored()))


def _sources_of(place: Place, content: bytes, catalog: Catalog) -> bytes:
    """Return what statistics of a place are about whose content has just been hashed and is not kept yet."""
    return content if isinstance(place, StoredTensor) else sources_of(catalog, place)


class _ContentHasher:
    """Hashes a tensor as a whole and block by block."""

    def __init__(self) -> None:
        self._whole = blake3()
        self._blocks: list[bytes] = []

    def update(self, raw: Raw) -> None:
        """Add the next block."""
        self._whole.update(raw.data)
        self._blocks.append(blake3(raw.data).digest())

    def record(self) -> ContentRecord:
        """Return what is to be kept."""
        return ContentRecord(self._whole.digest(length=KEY_BYTES), b"".join(self._blocks))


def _non_finite(place: Place, values: Array, start: int) -> NonFiniteError:
    """Return the error that names the first bad element."""
    position = int(np.flatnonzero(~np.isfinite(values))[0])
    return NonFiniteError(
        f"{place.describe()} holds {values[position]} at element {start + position}, and no merge of it can be right; "
        "repair the checkpoint or leave the model out"
    )
