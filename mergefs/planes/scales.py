"""The scales of groups: eight for each octave, below a power of two that a cell has for all of its groups."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

CODES: Final = 256
_PER_OCTAVE: Final = 8
_LOWEST_EXPONENT: Final = -100
_HIGHEST_EXPONENT: Final = 127


def _roots() -> list[float]:
    """Return 2 ** (k / 16) for k below 16, by square roots, which every CPU rounds alike."""
    half = math.sqrt(2.0)
    fourth = math.sqrt(half)
    eighth = math.sqrt(fourth)
    sixteenth = math.sqrt(eighth)
    factors = ((8, half), (4, fourth), (2, eighth), (1, sixteenth))
    return [math.prod(factor for bit, factor in factors if k & bit) for k in range(16)]


_ROOTS: Final = _roots()


def _power(sixteenths: int) -> float:
    """Return 2 ** (sixteenths / 16)."""
    return math.ldexp(_ROOTS[sixteenths % 16], sixteenths // 16)


_SCALES: Final = np.array([0.0, *(_power(2 * (code - CODES)) for code in range(1, CODES))])

_LIMITS: Final = np.array([_power(2 * (code - CODES) + 1) for code in range(1, CODES - 1)])
"""Between the scales of two codes that follow each other, from codes 1 and 2 on."""


def exponent_for(largest: float) -> int:
    """Return the exponent of a power of two that the scale ``largest`` is not far below."""
    return min(max(math.frexp(largest)[1], _LOWEST_EXPONENT), _HIGHEST_EXPONENT)


def scale_codes(wanted: NDArray[np.float64], exponent: int) -> NDArray[np.uint8]:
    """Return for each scale that is wanted the code of the nearest one; 0 for zero."""
    shares = np.ldexp(wanted, -exponent)
    codes: NDArray[np.uint8] = np.where(wanted > 0, np.searchsorted(_LIMITS, shares) + 1, 0).astype(np.uint8)
    return codes


SHARES: Final[NDArray[np.float32]] = _SCALES.astype(np.float32)
"""The scale of each code as a share of the power of two."""

POWERS: Final[NDArray[np.float32]] = np.ldexp(np.float32(1), np.arange(CODES, dtype=np.uint8).view(np.int8))
"""The power of two of each exponent, by the byte that it is kept in."""


def scales_of(codes: NDArray[np.uint8], exponent: int) -> NDArray[np.float32]:
    """Return the scales (float32) of codes."""
    scales: NDArray[np.float32] = SHARES[codes] * POWERS[exponent % CODES]
    return scales
