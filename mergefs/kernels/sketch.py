"""A small random projection of a long vector, from which inner products of any two such vectors can be estimated.

A signed count sketch (Charikar, Chen and Farach-Colton, 2002): every element is added to one of 128 buckets, with a
random sign. ``<sketch(a), sketch(b)>`` is ``<a, b>`` on average, with a variance of at most
``(|a|^2 |b|^2 + <a, b>^2) / 128``.

128 consecutive elements, a chunk, go to different buckets: by turns, from one that is drawn for each chunk. So two of
them never meet in one bucket, and an element of each row that stands out goes to another bucket in each. What is drawn
depends on the flat index of the first element of a chunk and on nothing else, so sketches of the same run of elements
go together, whenever they were made.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.random import words

SKETCH_SIZE: Final = 128
PLACES: Final = 2 * SKETCH_SIZE
"""A chunk is added from its first bucket on, past the end; what lies there is added to the buckets at last."""

_FIRST_BUCKET_BITS: Final = 7
_LARGEST_STEP: Final = 127


def signs_and_places(start: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the sign (1 or -1) and the place (0 to ``PLACES``) of ``count`` elements, those from ``start`` on.

    Three words are drawn for each chunk, at the flat indices of its first three elements (in a stream with key 0): the
    signs, of the first element in the lowest bit (one is negative), and the first bucket.
    """
    chunks = -(-count // SKETCH_SIZE)
    firsts = np.uint64(start) + np.arange(chunks, dtype=np.uint64) * np.uint64(SKETCH_SIZE)
    drawn = words(0, firsts[:, None] + np.arange(3, dtype=np.uint64))
    bits = (drawn[:, :2, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    signs = np.where(bits.reshape(chunks, SKETCH_SIZE), np.float32(-1), np.float32(1))
    first_buckets = (drawn[:, 2] >> np.uint64(64 - _FIRST_BUCKET_BITS)).astype(np.int64)
    places = first_buckets[:, None] + np.arange(SKETCH_SIZE)
    return signs.ravel()[:count], places.ravel()[:count]


def sketch(values: NDArray[np.float32], start: int) -> NDArray[np.float32]:
    """Return the sketch of a run of elements whose first has the flat index ``start``.

    Sums are float32, added in the order of the elements.
    """
    signs, places = signs_and_places(start, values.size)
    sums = np.zeros(PLACES, dtype=np.float32)
    np.add.at(sums, places, signs * values)
    return folded(sums)


def folded(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the buckets of the sums at all places."""
    buckets: NDArray[np.float32] = sums[:SKETCH_SIZE] + sums[SKETCH_SIZE:]
    return buckets


def quantised(sketches: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return sketches (one in each row) as int8 and, for each, the float32 that these are to be multiplied by.

    The largest magnitude of a sketch becomes 127. A sketch that is not finite becomes zero: nothing is known of it.
    """
    largest = np.abs(sketches).max(axis=1, initial=0.0)
    scales = (largest / np.float32(_LARGEST_STEP)).astype(np.float32)
    usable = np.isfinite(scales) & (scales > 0)
    scales = np.where(usable, scales, np.float32(0))
    with np.errstate(all="ignore"):
        steps = np.rint(sketches / np.where(usable, scales, np.float32(1))[:, None])
    steps[~usable] = 0
    return np.clip(steps, -_LARGEST_STEP, _LARGEST_STEP).astype(np.int8), scales
