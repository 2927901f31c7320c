"""The trellis code of deltas: what its bits mean, in plain numpy.

A *plane* is a stream of bits, one for each element and seven more. The *state* of an element is the number that eight
bits of the stream make, those that begin with its own position, the first of them counting least; so a state keeps
seven bits of the one before, and which states can follow each other is a trellis with two branches. Each plane has a
*book* of a value for each state, in steps of ``STEP``. The delta of an element is the sum of the values of its states
in all planes that are read, times the scale of its group. Planes after the first refine the sum, so any number of
them, from the first on, decodes.

At one bit for each Gaussian number it leaves 0.53 of their length, where no code can leave less than 0.50. The idea is
that of Marcellin and Fischer (Trellis coded quantization of memoryless and Gauss-Markov sources, 1990); which bits are
best is found by Viterbi's algorithm (``mergefs.kernels.fused.trellis_search``).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.precision import Array, Precision

STATE_BITS: Final = 8
STATES: Final = 1 << STATE_BITS
PLANES: Final = 8
"""The most planes that a delta can have."""

STEP: Final = 2.0**-12
"""What the values of books are multiples of; a scale is one."""


def stream_bytes(elements: int) -> int:
    """Return the bytes of a plane for ``elements`` (at least one) elements."""
    return (elements + STATE_BITS - 1 + 7) // 8


def states(stream: NDArray[np.uint8], elements: int) -> NDArray[np.int64]:
    """Return the state of each element of a plane."""
    bits = np.unpackbits(stream, bitorder="little").astype(np.int64)
    found: NDArray[np.int64] = np.zeros(elements, dtype=np.int64)
    for place in range(STATE_BITS):
        found += bits[place : place + elements] << place
    return found


def decode(
    streams: list[NDArray[np.uint8]], books: NDArray[np.int16], scales: Array, base: Array, precision: Precision
) -> Array:
    """Return base plus delta of elements that all have planes, rounded to ``precision``.

    ``streams`` are the planes that are read, ``books`` (planes, ``STATES``) the values of all planes, ``scales`` the
    scale (float32) of each element, ``base`` its value in the base, in the carrier of ``precision``. A delta is rounded
    to float32; its sum with the base is one in the carrier, which is then rounded to ``precision``.
    """
    sums: NDArray[np.int32] = np.zeros(base.size, dtype=np.int32)
    for stream, book in zip(streams, books, strict=False):
        sums += book[states(stream, base.size)]
    deltas = sums.astype(np.float32) * (scales.astype(np.float32) * np.float32(STEP))
    return precision.round(base + deltas)
