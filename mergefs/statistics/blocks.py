"""Block statistics in the catalog: how much each block of an expert differs from the base, and what its bytes are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import ContentRecord, DeltaRecord, NormRecord
from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.deltas import BlockMeasures
from mergefs.kernels.sketch import SKETCH_SIZE, quantised
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.place import Place
from mergefs.statistics.identity import keys_among, statistic_keys, tensor_keys

HASH_BYTES: Final = 32
_LARGEST_FLOAT: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class BlockDeltas:
    """The delta of one expert's tensor, block by block (arrays of as many entries as there are blocks).

    ``squared_norms``, ``absolute_sums`` and ``largest`` (float32) are those of expert minus base in the carrier type of
    the compute dtype, rounded to nearest; what is beyond float32, or no number since the compute dtype overflows, is
    the largest float32. ``changed`` (uint32) counts elements whose bits differ in the compute dtype. ``sketches`` (int8
    [blocks, 128]) times ``sketch_scales`` (float32 [blocks]) are sketches of the delta (``mergefs.kernels.sketch``):
    the inner product of two experts' deltas in a block is about the product of their scales times the sum, exact in
    integers, of the products of their sketches. A delta that is not finite has a sketch of zeros.
    """

    squared_norms: NDArray[np.float32]
    absolute_sums: NDArray[np.float32]
    largest: NDArray[np.float32]
    changed: NDArray[np.uint32]
    sketches: NDArray[np.int8]
    sketch_scales: NDArray[np.float32]

    @classmethod
    def unchanged(cls, blocks: int) -> "BlockDeltas":
        """Return those of a tensor whose ``blocks`` blocks are the base's."""
        numbers = np.zeros(blocks, dtype=np.float32)
        sketches = np.zeros((blocks, SKETCH_SIZE), dtype=np.int8)
        return cls(numbers, numbers, numbers, np.zeros(blocks, dtype=np.uint32), sketches, numbers)

    @classmethod
    def of(cls, measures: Sequence[BlockMeasures | None]) -> "BlockDeltas":
        """Return those with the given measures, None where a block is the base's."""
        found = cls.unchanged(len(measures))
        present = np.array([entry is not None for entry in measures], dtype=np.bool_)
        known = [entry for entry in measures if entry is not None]
        if not known:
            return found
        sketches, scales = quantised(np.stack([entry.sketch for entry in known]))
        return cls(
            _scattered(_bounded([entry.squared_norm for entry in known]), present),
            _scattered(_bounded([entry.absolute_sum for entry in known]), present),
            _scattered(_bounded([entry.largest for entry in known]), present),
            _scattered(np.array([entry.changed for entry in known], dtype=np.uint32), present),
            _scattered(sketches, present),
            _scattered(scales, present),
        )


def known_deltas(expert: Place, base: Place, compute: DType, catalog: Catalog) -> BlockDeltas | None:
    """Return the block statistics from the catalog, or None; of a tensor that is the base's they are known anyway."""
    options = [tensor_keys(place, catalog) for place in (expert, base)]
    if _are_equal(expert, base, options):
        return BlockDeltas.unchanged(BlockGrid.of(base.shape).count)
    for key in keys_among("delta", compute, 0, options):
        record = catalog.delta(key)
        if record is not None:
            return unpack(record)
    return None


def deltas_are_known(expert: Place, base: Place, compute: DType, catalog: Catalog) -> bool:
    """Return whether ``known_deltas`` has an answer, without unpacking it."""
    options = [tensor_keys(place, catalog) for place in (expert, base)]
    return _are_equal(expert, base, options) or any(
        catalog.delta(key) is not None for key in keys_among("delta", compute, 0, options)
    )


def _are_equal(expert: Place, base: Place, keys: Sequence[tuple[bytes, ...]]) -> bool:
    """Return whether two tensors with these ``tensor_keys`` have the same bytes, and these the same meaning."""
    return expert.dtype == base.dtype and bool(set(keys[0]) & set(keys[1]))


def known_norms(place: Place, compute: DType, catalog: Catalog) -> NDArray[np.float32] | None:
    """Return the squared norm (float32 [blocks]) of each block of a tensor itself in ``compute``, or None."""
    for key in statistic_keys("norms", (place,), compute, 0, catalog):
        record = catalog.norms(key)
        if record is not None:
            return np.frombuffer(record.squared_norms, dtype="<f4")
    return None


def split_hashes(record: ContentRecord) -> list[bytes]:
    """Return the hash of each block."""
    return [record.blocks[start : start + HASH_BYTES] for start in range(0, len(record.blocks), HASH_BYTES)]


def pack(deltas: BlockDeltas) -> DeltaRecord:
    """Return a record of ``deltas``; blocks without a change take a bit each, or none where all of them are so."""
    present = deltas.changed > 0
    packed = b"" if present.all() else np.packbits(present).tobytes()
    return DeltaRecord(
        blocks=present.size,
        present=packed,
        changed=deltas.changed[present].astype("<u4").tobytes(),
        squared_norms=deltas.squared_norms[present].astype("<f4").tobytes(),
        absolute_sums=deltas.absolute_sums[present].astype("<f4").tobytes(),
        largest=deltas.largest[present].astype("<f4").tobytes(),
        sketch_scales=deltas.sketch_scales[present].astype("<f4").tobytes(),
        sketches=deltas.sketches[present].tobytes(),
    )


def unpack(record: DeltaRecord) -> BlockDeltas:
    """Return what was packed."""
    present = np.ones(record.blocks, dtype=np.bool_)
    if record.present:
        bits = np.frombuffer(record.present, dtype=np.uint8)
        present = np.unpackbits(bits, count=record.blocks).astype(np.bool_)
    sketches = np.frombuffer(record.sketches, dtype=np.int8).reshape(-1, SKETCH_SIZE)
    return BlockDeltas(
        squared_norms=_scattered(np.frombuffer(record.squared_norms, dtype="<f4"), present),
        absolute_sums=_scattered(np.frombuffer(record.absolute_sums, dtype="<f4"), present),
        largest=_scattered(np.frombuffer(record.largest, dtype="<f4"), present),
        changed=_scattered(np.frombuffer(record.changed, dtype="<u4"), present),
        sketches=_scattered(sketches, present),
        sketch_scales=_scattered(np.frombuffer(record.sketch_scales, dtype="<f4"), present),
    )


def pack_norms(squared_norms: Sequence[float]) -> NormRecord:
    """Return a record of the squared norms of all blocks of a tensor."""
    return NormRecord(_bounded(squared_norms).astype("<f4").tobytes())


def _bounded(values: Sequence[float]) -> NDArray[np.float32]:
    """Return ``values`` as float32, the largest of these where they are larger or no number."""
    numbers = np.nan_to_num(np.array(values, dtype=np.float64), nan=_LARGEST_FLOAT, posinf=_LARGEST_FLOAT)
    return np.minimum(numbers, _LARGEST_FLOAT).astype(np.float32)


def _scattered(values: NDArray[Any], present: NDArray[np.bool_]) -> NDArray[Any]:
    """Return ``values`` in the rows where ``present`` is set, and zeros in the others."""
    if present.all():
        return values
    rows = np.zeros((present.size, *values.shape[1:]), dtype=values.dtype)
    rows[present] = values
    return rows
