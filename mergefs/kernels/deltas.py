"""What a planner needs to know of a block: how far an expert's elements are from the base's, in a few numbers.

The definition in numpy; ``mergefs.kernels.fused.deltas`` computes the same bits in one pass over the bytes.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.precision import Array, Precision, Raw, load
from mergefs.kernels.sketch import sketch

LANES: Final = 128
MAGNITUDE_BINS: Final = 1 << 15


@dataclass(frozen=True, slots=True)
class BlockMeasures:
    """The delta of one block: expert minus base in the type that values are carried in (see ``Precision``).

    ``squared_norm`` and ``absolute_sum`` are float64 sums of float64 squares and magnitudes: element ``i`` of the block
    is added to lane ``i % 128``, and then lanes are added in halves (64 to 64, 32 to 32, ...), so they are the same on
    every CPU. ``largest`` is the largest magnitude, ``changed`` counts elements that differ in any bit. ``sketch`` is
    that of the delta rounded to float32.
    """

    squared_norm: float
    absolute_sum: float
    largest: float
    changed: int
    sketch: NDArray[np.float32]


def measures(expert: Array, base: Array, start: int) -> BlockMeasures:
    """Return the measures of a block whose first element has the flat index ``start``; both in the same carrier."""
    bits = f"u{expert.dtype.itemsize}"
    with np.errstate(all="ignore"):
        delta = expert - base
        wide = delta.astype(np.float64)
        return BlockMeasures(
            squared_norm=lane_sum(wide * wide),
            absolute_sum=lane_sum(np.abs(wide)),
            largest=float(np.abs(delta).max(initial=0.0)),
            changed=int(np.count_nonzero(expert.view(bits) != base.view(bits))),
            sketch=sketch(delta.astype(np.float32), start),
        )


def lane_sum(terms: NDArray[np.float64]) -> float:
    """Return the sum in the order that ``BlockMeasures`` describes."""
    padded = np.zeros((max(1, -(-terms.size // LANES)), LANES))
    padded.reshape(-1)[: terms.size] = terms
    return fold_lanes(np.add.accumulate(padded, axis=0)[-1])


def fold_lanes(lanes: NDArray[np.float64]) -> float:
    """Return the sum of all lanes, added in halves."""
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return float(lanes[0])


class ReferenceMeter:
    """Measures the blocks of one tensor one after the other, and counts the magnitudes of all of them together.

    Counts are those of the delta rounded to the compute dtype, by the upper 15 bits of ``Precision.magnitude_keys``.
    """

    def __init__(self, compute: DType) -> None:
        self._precision = Precision(compute)
        self._counts: NDArray[np.int64] = np.zeros(MAGNITUDE_BINS, dtype=np.int64)

    def measure(self, expert: Raw, base: Raw, start: int) -> BlockMeasures:
        """Return the measures of a block that begins at the flat index ``start``; bytes are of the compute dtype."""
        dtype = self._precision.dtype
        values, origin = load(expert, dtype, dtype), load(base, dtype, dtype)
        with np.errstate(all="ignore"):
            delta: NDArray[np.floating[Any]] = self._precision.round(values - origin)
        shift = np.uint32(self._precision.key_bits - 15)
        self._counts += np.bincount(self._precision.magnitude_keys(delta) >> shift, minlength=MAGNITUDE_BINS)
        return measures(values, origin, start)

    def squared_norm(self, values: Raw) -> float:
        """Return the squared norm of a block itself, added up as ``BlockMeasures`` describes."""
        dtype = self._precision.dtype
        wide = load(values, dtype, dtype).astype(np.float64)
        with np.errstate(all="ignore"):
            return lane_sum(wide * wide)

    def histogram(self) -> NDArray[np.int64]:
        """Return how many magnitudes fell into each of the 32,768 bins, in order of magnitude."""
        counts: NDArray[np.int64] = self._counts.copy()
        return counts
