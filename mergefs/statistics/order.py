"""Order statistics of a quantity over a whole tensor: exact, by counting instead of sorting.

Keys that order as the values do are counted by their upper 16 bits, then by the next 16 within the bins that hold a
wanted rank, until all bits are known: one pass over a tensor of a 16 bit type, two in float32, four in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.methods.contract import Threshold

Keys: TypeAlias = NDArray[np.unsignedinteger[Any]]
KeyStream: TypeAlias = Callable[[], Iterator[tuple[int, Keys]]]
"""Starts a pass: yields for each block its first flat index and the keys of its elements."""

_DIGIT = 16
_BINS = 1 << _DIGIT
_MOST_COMPILED_BITS = 32


@dataclass(frozen=True, slots=True)
class Ranked:
    """The key that holds a rank, how many keys are smaller, and how many are equal to it."""

    key: int
    below: int
    equal: int


def ranked_keys(stream: KeyStream, bits: int, ranks: Sequence[int]) -> list[Ranked]:
    """Return the keys at ``ranks`` (from 0, rising) of all keys of ``bits`` bits, in ``bits / 16`` passes."""
    found = [Ranked(0, 0, 0) for _ in ranks]
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = _count(stream, shift, {one.key for one in found}, bits)
        found = [_narrowed(one, rank, counts[one.key]) for one, rank in zip(found, ranks, strict=True)]
    return found


def largest(stream: KeyStream, bits: int, size: int, keep: int) -> Threshold:
    """Return the threshold that keeps exactly ``keep`` of ``size`` keys (1 <= keep <= size), of equals the first."""
    (found,) = ranked_keys(stream, bits, [size - keep])
    surviving = keep - (size - found.below - found.equal)
    cut = size if surviving == found.equal else _locate(stream, found.key, surviving)
    return Threshold(found.key, cut)


def _count(stream: KeyStream, shift: int, prefixes: set[int], bits: int) -> dict[int, NDArray[np.int64]]:
    """Return for each of ``prefixes``, the bits above the wanted digit, how many keys have each value of that digit."""
    counts: dict[int, NDArray[np.int64]] = {prefix: np.zeros(_BINS, dtype=np.int64) for prefix in prefixes}
    count = _compiled_count() if bits <= _MOST_COMPILED_BITS else _count_plainly
    for _, keys in stream():
        for prefix, table in counts.items():
            count(keys, shift, prefix, table)
    return counts


def _count_plainly(keys: Keys, shift: int, prefix: int, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` those of the digit above ``shift`` of the keys that have ``prefix`` above it."""
    digits = keys >> keys.dtype.type(shift)
    if shift + _DIGIT < keys.itemsize * 8:
        digits = digits[(digits >> digits.dtype.type(_DIGIT)) == prefix] & digits.dtype.type(_BINS - 1)
    counts += np.bincount(digits, minlength=_BINS)


def _compiled_count() -> Callable[[Keys, int, int, NDArray[np.int64]], None]:
    """Return what does the same in one pass."""
    from mergefs.kernels.fused.digits import count_digits

    return count_digits


def _narrowed(known: Ranked, rank: int, counts: NDArray[np.int64]) -> Ranked:
    """Return ``known`` with the next digit of its key."""
    totals = np.cumsum(counts)
    digit = int(np.searchsorted(totals, rank - known.below, side="right"))
    before = int(totals[digit - 1]) if digit else 0
    return Ranked(known.key << _DIGIT | digit, known.below + before, int(counts[digit]))


def _locate(stream: KeyStream, key: int, surviving: int) -> int:
    """Return one more than the flat index of the ``surviving``-th element that has ``key``."""
    for start, keys in stream():
        places = np.flatnonzero(keys == keys.dtype.type(key))
        if places.size >= surviving:
            return start + int(places[surviving - 1]) + 1
        surviving -= places.size
    raise ValueError("fewer elements at the threshold than were counted")
