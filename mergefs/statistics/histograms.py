"""The magnitude histogram of a delta in the catalog: a few kilobytes, whatever the size of the tensor."""

import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import HistogramRecord
from mergefs.checkpoint.dtypes import DType
from mergefs.kernels.deltas import MAGNITUDE_BINS
from mergefs.sources.place import Place
from mergefs.statistics.blocks import known_norms
from mergefs.statistics.identity import local_key, statistic_keys

_SEVEN_BITS = 0x7F
_MORE = 0x80


def histogram_keys(expert: Place, base: Place, compute: DType, catalog: Catalog) -> list[bytes]:
    """Return the keys that the histogram of a delta may be kept under, the best first."""
    return statistic_keys("histogram", (expert, base), compute, 0, catalog)


def known_histogram(expert: Place, base: Place, compute: DType, catalog: Catalog) -> NDArray[np.int64] | None:
    """Return how many magnitudes of the delta fall into each of the 32,768 bins, or None where that is not known."""
    first, second = (catalog.content_digest(local_key(place)) for place in (expert, base))
    # The delta of a NaN is none; only a base that was measured is known to have no NaN.
    if first is not None and first == second and known_norms(base, compute, catalog) is not None:
        counts: NDArray[np.int64] = np.zeros(MAGNITUDE_BINS, dtype=np.int64)
        counts[0] = expert.elements
        return counts
    for key in histogram_keys(expert, base, compute, catalog):
        record = catalog.histogram(key)
        if record is not None:
            return unpack(record)
    return None


def pack(counts: NDArray[np.int64]) -> HistogramRecord:
    """Return a record of ``counts``.

    The gaps between bins that are not empty, and then their counts, are written with seven bits in each byte, the
    lowest first and the highest bit set where more follow, and compressed by zlib.
    """
    filled = np.flatnonzero(counts)
    numbers = [filled.size, *np.diff(filled, prepend=0).tolist(), *counts[filled].tolist()]
    return HistogramRecord(zlib.compress(_variable_length(numbers), 9))


def unpack(record: HistogramRecord) -> NDArray[np.int64]:
    """Return what was packed."""
    numbers = np.array(_numbers(zlib.decompress(record.packed)), dtype=np.int64)
    filled = int(numbers[0])
    counts: NDArray[np.int64] = np.zeros(MAGNITUDE_BINS, dtype=np.int64)
    counts[np.cumsum(numbers[1 : 1 + filled])] = numbers[1 + filled :]
    return counts


def _variable_length(numbers: Iterable[int]) -> bytes:
    """Return numbers, none of them negative, in as few bytes as each needs."""
    written = bytearray()
    for number in numbers:
        while number > _SEVEN_BITS:
            written.append(number & _SEVEN_BITS | _MORE)
            number >>= 7
        written.append(number)
    return bytes(written)


def _numbers(written: bytes) -> list[int]:
    """Return the numbers that ``_variable_length`` has written."""
    numbers = []
    number = shift = 0
    for byte in written:
        number |= (byte & _SEVEN_BITS) << shift
        shift += 7
        if not byte & _MORE:
            numbers.append(number)
            number = shift = 0
    return numbers
