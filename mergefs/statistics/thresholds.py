"""Which magnitudes of a delta survive a density: exact, by counting instead of sorting.

A 16 bit magnitude has 32,768 bit patterns, so one histogram of them holds the threshold of every density. A float32
magnitude has 2**31: the histogram counts its upper 15 bits, and one more pass counts the lower 16 within the bin that
holds the wanted rank. Where several elements sit exactly at the threshold and only some of them survive, those with the
lowest flat indices do, and one more pass, up to the last of them, finds where that is.
"""

import math

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Precision, Raw, load, store
from mergefs.methods.contract import Threshold
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.statistics.pair import TensorPair

BINS = 1 << 15
_SMALLEST_SUM = 1e-7


def magnitude_histogram(pair: TensorPair, fused: bool = True) -> NDArray[np.int64]:
    """Return how many magnitudes of the delta fall into each of the 32,768 bins, in order of magnitude.

    A fused kernel counts where there is one for the compute dtype and ``fused`` allows it; the counts are the same.
    """
    if fused and pair.compute in FUSED_DTYPES:
        return _fused_histogram(pair)
    precision = Precision(pair.compute)
    shift = np.uint32(precision.key_bits - 15)
    counts: NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)
    for _, delta in pair.deltas():
        counts += np.bincount(precision.magnitude_keys(delta) >> shift, minlength=BINS)
    return counts


def _fused_histogram(pair: TensorPair) -> NDArray[np.int64]:
    """Return ``magnitude_histogram`` without an array of deltas in between."""
    from mergefs.kernels.fused import histogram as kernel
    from mergefs.kernels.fused.memory import address, empty

    tables: NDArray[np.int64] = np.zeros((kernel.TABLES, BINS), dtype=np.int64)
    bins: NDArray[np.uint32] = np.empty(kernel.TILE, dtype=np.uint32)
    like = empty(0, pair.compute)
    for start, stop in pair.grid:
        expert, base = (_in_compute_dtype(pair, place, start, stop) for place in (pair.expert, pair.base))
        size = np.uint64(stop - start)
        kernel.KERNEL.compiled(pair.compute)(like, address(expert), address(base), size, tables, bins)
    counts: NDArray[np.int64] = tables.sum(axis=0)
    return counts


def _in_compute_dtype(pair: TensorPair, place: Place, start: int, stop: int) -> Raw:
    """Return the bytes of a run of elements, converted where they are stored in another dtype.

    As ``TensorPair.deltas`` converts them, with the payload of NaN: a rank may lie among the NaN, and the later passes
    look for its key.
    """
    raw = place.read(pair.reader, start, stop, Purpose.ANALYSIS)
    stored = place.dtype
    if stored == pair.compute:
        return raw
    with np.errstate(all="ignore"):
        return store(load(raw, stored, pair.compute), pair.compute, pair.compute)


def threshold(pair: TensorPair, histogram: NDArray[np.int64], keep: int) -> Threshold:
    """Return the threshold that keeps exactly ``keep`` elements (1 <= keep <= elements)."""
    precision = Precision(pair.compute)
    key, above = _rank(histogram, keep)
    equal = int(histogram[key])
    if precision.key_bits == 31:
        fine = _refine(pair, key)
        low, above_in_bin = _rank(fine, keep - above)
        key, above, equal = key << 16 | low, above + above_in_bin, int(fine[low])
    surviving = keep - above
    cut = pair.expert.elements if surviving == equal else _locate(pair, key, surviving)
    return Threshold(key, cut)


def rescale_factor(pair: TensorPair, limit: Threshold, outliers: Threshold | None = None) -> float:
    """Return sum|delta| / sum|delta that survives ``limit``, or 1.0 where either is below 1e-7.

    What survives ``outliers`` is dropped as well.
    Both sums are rounded to the compute dtype before they are divided, as mergekit rounds them, unless that overflows.
    """
    precision = Precision(pair.compute)
    whole: list[float] = []
    kept: list[float] = []
    for start, delta in pair.deltas():
        magnitudes = np.abs(delta).astype(np.float64)
        keys = precision.magnitude_keys(delta)
        survives = limit.keeps(keys, start)
        if outliers is not None:
            survives &= ~outliers.keeps(keys, start)
        whole.append(float(magnitudes.sum()))
        kept.append(float((magnitudes * survives).sum()))
    before, after = math.fsum(whole), math.fsum(kept)
    with np.errstate(over="ignore"):
        rounded = [float(precision.scalar(total)) for total in (before, after)]
    if all(map(math.isfinite, rounded)):
        before, after = rounded
    return 1.0 if before < _SMALLEST_SUM or after < _SMALLEST_SUM else before / after


def _rank(histogram: NDArray[np.int64], keep: int) -> tuple[int, int]:
    """Return the bin that holds the ``keep``-th largest magnitude, and how many lie in the bins above it."""
    from_the_top = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(from_the_top, keep))
    above = int(from_the_top[position - 1]) if position else 0
    return histogram.size - 1 - position, above


def _refine(pair: TensorPair, coarse: int) -> NDArray[np.int64]:
    """Return how many magnitudes of the bin ``coarse`` have each of the 65,536 lower halves."""
    precision = Precision(pair.compute)
    counts: NDArray[np.int64] = np.zeros(1 << 16, dtype=np.int64)
    for _, delta in pair.deltas():
        keys = precision.magnitude_keys(delta)
        counts += np.bincount(keys[(keys >> np.uint32(16)) == coarse] & np.uint32(0xFFFF), minlength=1 << 16)
    return counts


def _locate(pair: TensorPair, key: int, surviving: int) -> int:
    """Return one more than the flat index of the ``surviving``-th element whose magnitude has ``key``."""
    precision = Precision(pair.compute)
    for start, delta in pair.deltas():
        places = np.flatnonzero(precision.magnitude_keys(delta) == np.uint32(key))
        if places.size >= surviving:
            return start + int(places[surviving - 1]) + 1
        surviving -= places.size
    raise ValueError("fewer elements at the threshold than the histogram counted")
