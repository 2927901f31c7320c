"""Which magnitudes of a delta survive a density: exact, by counting instead of sorting.

A 16 bit magnitude has 32,768 bit patterns, so one histogram of them holds the threshold of every density. A float32
magnitude has 2**31: the histogram counts its upper 15 bits, and one more pass counts the lower 16 within the bin that
holds the wanted rank. Where several elements sit exactly at the threshold and only some of them survive, those with the
lowest flat indices do, and one more pass, up to the last of them, finds where that is.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, DType
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw, load, store
from mergefs.methods.contract import Threshold
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.statistics.pair import TensorPair

BINS = 1 << 15
_FINE_BINS = 1 << 16
_SMALLEST_SUM = 1e-7


@dataclass(frozen=True, slots=True)
class Sought:
    """A threshold that keeps exactly ``keep`` elements (1 <= keep <= elements) of a delta with this histogram."""

    pair: TensorPair
    histogram: NDArray[np.int64]
    keep: int


@dataclass(frozen=True, slots=True)
class _Ranked:
    """The key that holds a rank, how many keys are above it, and how many are equal to it."""

    key: int
    above: int
    equal: int


def magnitude_histogram(pair: TensorPair, fused: bool = True) -> NDArray[np.int64]:
    """Return how many magnitudes of the delta fall into each of the 32,768 bins, in order of magnitude.

    A fused kernel counts where there is one for the compute dtype and ``fused`` allows it; the counts are the same.
    """
    return magnitude_histograms([pair], fused)[0]


def magnitude_histograms(pairs: Sequence[TensorPair], fused: bool = True) -> list[NDArray[np.int64]]:
    """Return the histogram of each delta; all have the same base, which is read once."""
    counters = [_counter(pair.compute, fused) for pair in pairs]
    for _, index, expert, base in _blocks(pairs, lambda _: True):
        counters[index].add(expert, base)
    return [counter.total() for counter in counters]


def threshold(pair: TensorPair, histogram: NDArray[np.int64], keep: int) -> Threshold:
    """Return the threshold that keeps exactly ``keep`` elements (1 <= keep <= elements)."""
    return find_thresholds([Sought(pair, histogram, keep)])[0]


def find_thresholds(sought: Sequence[Sought], fused: bool = True) -> list[Threshold]:
    """Return thresholds of deltas that all have the same base, which is read once in each pass.

    Fused kernels are used as by ``magnitude_histogram``.
    """
    ranked = [_ranked(one.histogram, one.keep) for one in sought]
    pairs = [one.pair for one in sought]
    if pairs and Precision(pairs[0].compute).key_bits == 31:
        fine = _refined(pairs, [one.key for one in ranked], fused)
        within = [
            _ranked(counts, one.keep - coarse.above) for counts, one, coarse in zip(fine, sought, ranked, strict=True)
        ]
        ranked = [
            _Ranked(coarse.key << 16 | one.key, coarse.above + one.above, one.equal)
            for coarse, one in zip(ranked, within, strict=True)
        ]
    surviving = [one.keep - found.above for one, found in zip(sought, ranked, strict=True)]
    split = [index for index, found in enumerate(ranked) if surviving[index] < found.equal]
    places = _located(
        [pairs[index] for index in split],
        [ranked[index].key for index in split],
        [surviving[index] for index in split],
        fused,
    )
    cuts = dict(zip(split, places, strict=True))
    return [
        Threshold(found.key, cuts.get(index, pair.expert.elements))
        for index, (found, pair) in enumerate(zip(ranked, pairs, strict=True))
    ]


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


def _ranked(histogram: NDArray[np.int64], keep: int) -> _Ranked:
    """Return the bin that holds the ``keep``-th largest magnitude."""
    from_the_top = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(from_the_top, keep))
    above = int(from_the_top[position - 1]) if position else 0
    key = histogram.size - 1 - position
    return _Ranked(key, above, int(histogram[key]))


def _refined(pairs: Sequence[TensorPair], coarse: Sequence[int], fused: bool) -> list[NDArray[np.int64]]:
    """Return how many magnitudes of one bin of each delta have each of the 65,536 lower halves."""
    refine = _way(pairs[0].compute, fused).refine
    counts: list[NDArray[np.int64]] = [np.zeros(_FINE_BINS, dtype=np.int64) for _ in pairs]
    for _, index, expert, base in _blocks(pairs, lambda _: True):
        refine(expert, base, coarse[index], counts[index])
    return counts


def _located(pairs: Sequence[TensorPair], keys: Sequence[int], surviving: Sequence[int], fused: bool) -> list[int]:
    """Return one more than the flat index of the ``surviving``-th element of each delta whose magnitude has the key."""
    left = list(surviving)
    cuts: dict[int, int] = {}
    if not pairs:
        return []
    locate = _way(pairs[0].compute, fused).locate
    for start, index, expert, base in _blocks(pairs, lambda index: index not in cuts):
        seen, place = locate(expert, base, keys[index], left[index])
        left[index] -= seen
        if place is not None:
            cuts[index] = start + place + 1
    if len(cuts) < len(pairs):
        raise ValueError("fewer elements at the threshold than the histogram counted")
    return [cuts[index] for index in range(len(pairs))]


def _blocks(pairs: Sequence[TensorPair], wants: Callable[[int], bool]) -> Iterator[tuple[int, int, Raw, Raw]]:
    """Yield the blocks of those pairs of one base that want to go on: first flat index, which pair, expert, base.

    Bytes are of the compute dtype. Ends when none wants to.
    """
    for start, stop in pairs[0].grid if pairs else ():
        active = [index for index in range(len(pairs)) if wants(index)]
        if not active:
            return
        base = _in_compute_dtype(pairs[0], pairs[0].base, start, stop)
        for index in active:
            yield start, index, _in_compute_dtype(pairs[index], pairs[index].expert, start, stop), base


def _in_compute_dtype(pair: TensorPair, place: Place, start: int, stop: int) -> Raw:
    """Return the bytes of a run of elements, converted where they are stored in another dtype.

    With the payload of NaN, which compiled conversions keep in BF16 alone (it has none): a rank may lie among the NaN,
    and the later passes look for its key.
    """
    raw = place.read(pair.reader, start, stop, Purpose.ANALYSIS)
    stored, compute = place.dtype, pair.compute
    if stored == compute:
        return raw
    if compute == BF16 and stored in FUSED_DTYPES:
        from mergefs.kernels.fused.conversion import convert

        return convert(raw, stored, compute)
    with np.errstate(all="ignore"):
        return store(load(raw, stored, compute), compute, compute)


class _Counter(Protocol):
    """Counts the magnitudes of one delta, block by block; bytes are of the compute dtype."""

    def add(self, expert: Raw, base: Raw) -> None: ...
    def total(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True, slots=True)
class _Way:
    """What looks at one block of a delta for keys; ``mergefs.kernels.fused`` says what the two do."""

    refine: Callable[[Raw, Raw, int, NDArray[np.int64]], None]
    locate: Callable[[Raw, Raw, int, int], tuple[int, int | None]]


def _counter(compute: DType, fused: bool) -> _Counter:
    """Return what counts the magnitudes of a delta."""
    if not (fused and compute in FUSED_DTYPES):
        return _PlainCounter(Precision(compute))
    from mergefs.kernels.fused.histogram import Histogram

    return Histogram(compute)


def _way(compute: DType, fused: bool) -> _Way:
    """Return what looks for keys in a delta."""
    if not (fused and compute in FUSED_DTYPES):
        precision = Precision(compute)
        return _Way(partial(_plain_refine, precision), partial(_plain_locate, precision))
    from mergefs.kernels.fused import location, refinement

    return _Way(refinement.refine, partial(location.locate, compute))


class _PlainCounter:
    """Counts by numpy."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._counts: NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)

    def add(self, expert: Raw, base: Raw) -> None:
        """Count those of a block."""
        shift = np.uint32(self._precision.key_bits - 15)
        self._counts += np.bincount(_keys(self._precision, expert, base) >> shift, minlength=BINS)

    def total(self) -> NDArray[np.int64]:
        """Return the counts."""
        return self._counts


def _plain_refine(precision: Precision, expert: Raw, base: Raw, coarse: int, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` the magnitudes in the bin ``coarse``."""
    keys = _keys(precision, expert, base)
    counts += np.bincount(keys[(keys >> np.uint32(16)) == coarse] & np.uint32(0xFFFF), minlength=_FINE_BINS)


def _plain_locate(precision: Precision, expert: Raw, base: Raw, key: int, wanted: int) -> tuple[int, int | None]:
    """Return how many magnitudes have ``key``, and the index of the ``wanted``-th of them if it is here."""
    places = np.flatnonzero(_keys(precision, expert, base) == np.uint32(key))
    return places.size, int(places[wanted - 1]) if places.size >= wanted else None


def _keys(precision: Precision, expert: Raw, base: Raw) -> NDArray[np.uint32]:
    """Return the keys of the magnitudes of a delta, from bytes of the compute dtype."""
    dtype = precision.dtype
    with np.errstate(all="ignore"):
        delta: Array = precision.round(load(expert, dtype, dtype) - load(base, dtype, dtype))
    return precision.magnitude_keys(delta)
