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
from dataclasses import dataclass
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
_POINTS: Final = 2001
"""So many numbers of steps are tabulated; what lies between them is interpolated."""
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
    root = np.sqrt(np.maximum(base, np.finfo(np.float64).tiny))
    octave = np.floor(np.log2(root))
    part = np.minimum(((np.log2(root) - octave) * _PARTS).astype(np.int64), _PARTS - 1)
    step = 2 * unit_roundoff(dtype) * np.exp2(octave + np.array(_BINADES)[:, np.newaxis])
    averages = _averages()
    steps = np.minimum(np.sqrt(change) / step, _MANY_STEPS)
    more = np.interp(steps, averages.steps, averages.anywhere)
    if on_grid:
        spread = np.interp(np.minimum(np.sqrt(beside) / step, _MANY_STEPS), averages.steps, averages.gain)
        more = spread * more + (1 - spread) * np.interp(steps, averages.steps, averages.on_the_grid)
    added = (_likely_sizes()[:, part] * more * step**2).sum(axis=0)
    changed: Numbers = np.maximum(change + added, 0.0)
    return changed


@lru_cache(maxsize=1)
def _likely_sizes() -> Numbers:
    """Return for each binade, relative to the octave of the root mean square, how likely a normal number lies in it.

    By the part of the octave that the root mean square lies in (float64 [binades, parts]); what is smaller than all of
    them counts as smallest.
    """
    roots = [2 ** ((part + 0.5) / _PARTS) for part in range(_PARTS)]
    below = np.array([[math.erf(2.0**binade / root / math.sqrt(2)) for root in roots] for binade in _BINADES[1:]])
    likely: Numbers = np.diff(below, axis=0, prepend=np.zeros((1, _PARTS)), append=np.ones((1, _PARTS)))
    return likely


@dataclass(frozen=True, slots=True, eq=False)
class _Averages:
    """What rounding to an integer does on average to normal numbers whose standard deviations are ``steps``.

    ``anywhere`` is what it adds to the mean square of their difference from something that lies anywhere between two
    integers, ``on_the_grid`` from an integer; ``gain`` is the share of them that is left.
    """

    steps: Numbers
    anywhere: Numbers
    on_the_grid: Numbers
    gain: Numbers


@lru_cache(maxsize=1)
def _averages() -> _Averages:
    """Return the averages for up to ``_MANY_STEPS`` steps, by their Fourier series."""
    steps = np.linspace(0.0, _MANY_STEPS, _POINTS)
    few = steps < _FEW_STEPS
    numbers = np.arange(1, _TERMS + 1)[:, np.newaxis]
    decays = np.exp(-2 * (math.pi * numbers * steps) ** 2)
    signed = (-1.0) ** numbers * decays
    squares = (math.pi * numbers) ** 2
    anywhere = np.where(few, math.sqrt(2 / math.pi) * steps - steps**2, 1 / 6 - (decays / squares).sum(axis=0))
    rounded = steps**2 * (1 + 4 * signed.sum(axis=0)) + 1 / 12 + (signed / squares).sum(axis=0)
    on_the_grid = np.where(few, 0.0, np.maximum(rounded, 0.0)) - steps**2
    gain = np.where(few, 0.0, np.clip(1 + 2 * signed.sum(axis=0), 0.0, 1.0))
    return _Averages(steps, anywhere, on_the_grid, gain)
