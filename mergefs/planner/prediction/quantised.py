"""What the last rounding of a merge is expected to do to its error.

Deltas are often no larger than the unit in the last place of the base, above all in BF16. Then a merge that differs by
r before it is rounded differs by something else after: with a step D of the grid, by ``r^2 + p (D - p)`` in the mean
square, where p is what r leaves of a multiple of D, as long as what r is added to lies anywhere between two points of
the grid (Schuchman 1964, "Dither signals and their effect on quantization noise"; Widrow and Kollar 2008, "Quantization
Noise", chapter 4). Where it is added to a point of the grid, the base, it is lost as long as it is below D / 2.

Elements of the base and of r are taken as normally distributed, so these means have closed forms (Fourier series of the
sawtooth), and how many elements have which D follows from the norm of the base.
"""

import math
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.methods.rounding import unit_roundoff

Numbers: TypeAlias = NDArray[np.float64]

_TERMS: Final = 6
_FEW_STEPS: Final = 0.12
"""Below so many steps the series need more terms, and what they add up to is simple."""
_MANY_STEPS: Final = 10.0
"""From so many steps on, what rounding adds does not depend on their number any more."""
_BINADES: Final = range(-12, 3)
"""How many powers of two the sizes of elements of the base are looked for beside their root mean square."""
_PARTS: Final = 32
"""In so many parts an octave is cut where sizes are looked up."""


def rounded_change(change: Numbers, beside: Numbers, base: Numbers, dtype: DType, on_grid: bool) -> Numbers:
    """Return the mean square that a change of a merge has after rounding to ``dtype``.

    ``change`` is its mean square before, of elements that it is not 0 of; ``beside`` that of what it is added to, less
    the base, whose mean square is ``base`` (float64, one entry for each block). ``on_grid`` says that the base consists
    of numbers of ``dtype``.
    """
    added: Numbers = np.zeros_like(change)
    root = np.sqrt(np.maximum(base, np.finfo(np.float64).tiny))
    octave = np.floor(np.log2(root))
    part = np.minimum(((np.log2(root) - octave) * _PARTS).astype(np.int64), _PARTS - 1)
    for binade, likely in zip(_BINADES, _likely_sizes(), strict=True):
        step = 2 * unit_roundoff(dtype) * np.exp2(octave + binade)
        steps = np.minimum(np.sqrt(change) / step, _MANY_STEPS)
        more = _noise(steps)
        if on_grid:
            spread = _gain(np.minimum(np.sqrt(beside) / step, _MANY_STEPS))
            more = spread * more + (1 - spread) * (_of_the_grid(steps) - steps**2)
        added = added + likely[part] * more * step**2
    return np.maximum(change + added, 0.0)


@lru_cache(maxsize=1)
def _likely_sizes() -> tuple[Numbers, ...]:
    """Return for each binade, relative to the octave of the root mean square, how likely a normal number lies in it.

    By the part of the octave that the root mean square lies in; what is smaller than all of them counts as smallest.
    """
    roots = [2 ** ((part + 0.5) / _PARTS) for part in range(_PARTS)]

    def below(binade: int) -> Numbers:
        if binade == _BINADES[0]:
            return np.zeros(_PARTS)
        if binade > _BINADES[-1]:
            return np.ones(_PARTS)
        return np.array([math.erf(2.0**binade / root / math.sqrt(2)) for root in roots])

    return tuple(below(binade + 1) - below(binade) for binade in _BINADES)


def _decays(steps: Numbers) -> list[Numbers]:
    """Return the means of ``cos(2 pi k x)`` of normal numbers with these standard deviations, for k from 1 on."""
    return [np.exp(-2 * (math.pi * k * steps) ** 2) for k in range(1, _TERMS + 1)]


def _noise(steps: Numbers) -> Numbers:
    """Return the mean of p (1 - p), p being the distance of a normal number from the integer below it."""
    series = 1 / 6 - sum(decay / (math.pi * k) ** 2 for k, decay in enumerate(_decays(steps), 1))
    return np.where(steps < _FEW_STEPS, math.sqrt(2 / math.pi) * steps - steps**2, series)


def _gain(steps: Numbers) -> Numbers:
    """Return which share of a normal number is left on average when it is rounded to an integer."""
    series = 1 + 2 * sum((-1) ** k * decay for k, decay in enumerate(_decays(steps), 1))
    return np.where(steps < _FEW_STEPS, 0.0, np.clip(series, 0.0, 1.0))


def _of_the_grid(steps: Numbers) -> Numbers:
    """Return the mean square of a normal number that is rounded to an integer."""
    signed = [(-1) ** k * decay for k, decay in enumerate(_decays(steps), 1)]
    series = steps**2 * (1 + 4 * sum(signed)) + 1 / 12 + sum(d / (math.pi * k) ** 2 for k, d in enumerate(signed, 1))
    return np.where(steps < _FEW_STEPS, 0.0, np.maximum(series, 0.0))
