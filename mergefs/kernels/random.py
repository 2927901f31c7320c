"""A counter-based random generator: the draw for an element depends on nothing but its place.

SplitMix64 (Steele, Lea and Flood, 2014) read as a function of a counter: element ``i`` of the stream with key ``k`` is
``mix(k + (i + 1) * gamma)``. Any range can be drawn on its own, in any order, and always comes out the same.
"""

import struct

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
UNIFORM_BITS = 24


def stream_key(seed: int, model: int, tensor: str) -> int:
    """Return the 64 bit key of the stream for one tensor of one model."""
    digest = blake3(struct.pack("<QQ", seed & _MASK, model) + tensor.encode("utf-8")).digest(length=8)
    return int.from_bytes(digest, "little")


def uniform_integers(key: int, start: int, count: int) -> NDArray[np.uint32]:
    """Return ``count`` integers, uniform on [0, 2**24), for the elements from ``start`` on."""
    state = words(key, np.arange(start, start + count, dtype=np.uint64))
    draws: NDArray[np.uint32] = (state >> np.uint64(64 - UNIFORM_BITS)).astype(np.uint32)
    return draws


def words(key: int, elements: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64 random bits for each of ``elements``, indices into the stream with ``key``; of any shape."""
    state: NDArray[np.uint64] = elements + np.uint64(1)
    with np.errstate(over="ignore"):
        state *= np.uint64(_GAMMA)
        state += np.uint64(key)
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def bernoulli_limit(probability: float) -> int:
    """Return the limit below which a draw of ``uniform_integers`` means "keep", for a probability in [0, 1]."""
    return int(np.ceil(np.float64(probability) * (1 << UNIFORM_BITS)))
