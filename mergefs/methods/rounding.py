"""What rounding can add to a merge that is linear in its inputs: a running error analysis, which nothing escapes.

A kernel computes numbers that are, in exact arithmetic, linear in the deltas and the base. ``Analysis`` follows its
steps and keeps for each such number how far the computed one can be from it (Wilkinson 1963; Higham 2002, "Accuracy and
Stability of Numerical Algorithms", chapter 3). All bounds hold for every element, whatever the data, as long as no
number outgrows its dtype; ``Rounding.peaks`` tell how large they get.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import BF16, F16, F32, F64, DType

_DIGITS = {BF16: 8, F16: 11, F32: 24, F64: 53}
"""Significant bits of a number, the leading one among them."""
_SMALLEST = {BF16: -133, F16: -24, F32: -149, F64: -1074}
"""The exponent of the smallest number above zero."""
_LARGEST = {BF16: (2 - 2.0**-7) * 2.0**127, F16: 65504.0, F32: (2 - 2.0**-23) * 2.0**127, F64: np.finfo(np.float64).max}

_OF_FACTORS = 2.0**-51
"""How far, relatively, one float64 operation on factors can be off at most: a quotient takes two roundings."""


def unit_roundoff(dtype: DType) -> float:
    """Return by how much, relatively, rounding to the nearest ``dtype`` changes a number at most."""
    return float(2.0 ** -_DIGITS[dtype])


def unit_of_results(dtype: DType) -> float:
    """Return the same of a result that is first rounded to the type that values of ``dtype`` are carried in."""
    unit = unit_roundoff(dtype)
    carried = unit_roundoff(F32) if dtype in (BF16, F16) else 0.0
    return unit + carried + unit * carried


def smallest_change(dtype: DType) -> float:
    """Return by how much rounding to the nearest ``dtype`` changes a number at most that is nearly zero."""
    return math.ldexp(1.0, max(_SMALLEST[dtype] - 1, -1074))


def largest_number(dtype: DType) -> float:
    """Return the largest finite number of ``dtype``."""
    return float(_LARGEST[dtype])


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far what a kernel computes, before its last rounding, can be from the exact linear combination.

    For every element that is at most ``sum(noise[i] * |delta_i|) + base_noise * |base| + floor``, and no number on the
    way is larger than ``sum(peaks[i] * |delta_i|) + base_peak * |base| + floor``. The numbers of inputs are in the
    order of the inputs, 0 for the base among them.
    """

    noise: tuple[float, ...]
    base_noise: float
    floor: float
    peaks: tuple[float, ...]
    base_peak: float


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A number that is linear in the deltas of the inputs and, last, in the base, and how far the computed one may be.

    ``factors`` are those of the exact number; ``noise`` and ``floor`` bound the error as in ``Rounding``.
    """

    factors: NDArray[np.float64]
    noise: NDArray[np.float64]
    floor: float

    def __add__(self, other: "Form") -> "Form":
        """Return the exact sum of both."""
        both = (self.factors != 0) & (other.factors != 0)
        slip = np.where(both, _OF_FACTORS * (np.abs(self.factors) + np.abs(other.factors)), 0.0)
        return Form(self.factors + other.factors, self.noise + other.noise + slip, self.floor + other.floor)

    def __sub__(self, other: "Form") -> "Form":
        """Return the exact difference of both."""
        return self + other * -1.0

    def __mul__(self, number: float) -> "Form":
        """Return the exact product with a number."""
        size = abs(number)
        slip = 0.0 if size == 1 else _OF_FACTORS * size
        noise = self.noise * size + slip * np.abs(self.factors)
        return Form(self.factors * number, noise, self.floor * size)

    def __truediv__(self, number: float) -> "Form":
        """Return the exact quotient by a number."""
        return self * (1.0 / number if number else math.inf)

    @property
    def sizes(self) -> NDArray[np.float64]:
        """What the computed number is at most, of each delta and of the base."""
        return np.abs(self.factors) + self.noise


class Analysis:
    """Follows a kernel of ``models`` inputs step by step; ``base`` is the index of the base among these, or None."""

    def __init__(self, models: int, base: int | None, compute: DType) -> None:
        self._models = models
        self._base = base
        self._compute = compute
        self._carrier = F64 if compute == F64 else F32
        self._peaks: NDArray[np.float64] = np.zeros(models + 1)

    def number(self, number: float) -> float:
        """Return a coefficient as the type that values are carried in has it."""
        return float(np.float64(number) if self._carrier == F64 else np.float32(number))

    def zero(self) -> Form:
        """Return the number 0."""
        return Form(np.zeros(self._models + 1), np.zeros(self._models + 1), 0.0)

    def base(self) -> Form:
        """Return an element of the base."""
        form = self.zero()
        form.factors[-1] = 1.0
        return form

    def exact_delta(self, model: int) -> Form:
        """Return an element of the delta of one input, as it is before any rounding."""
        form = self.zero()
        if model != self._base:
            form.factors[model] = 1.0
        return form

    def input(self, model: int) -> Form:
        """Return an element of one input: the base's, and what the model adds to it."""
        return self.base() + self.exact_delta(model)

    def delta(self, model: int) -> Form:
        """Return an element of the delta of one input, rounded to the compute dtype."""
        return self.rounded(self.exact_delta(model))

    def carried(self, form: Form) -> Form:
        """Return the result of an operation in the type that values are carried in: float32, or float64 for F64."""
        return self._rounded_to(form, self._carrier)

    def rounded(self, form: Form) -> Form:
        """Return the result of an operation that is then rounded to the compute dtype."""
        carried = self.carried(form)
        return carried if self._compute == self._carrier else self._rounded_to(carried, self._compute)

    def _rounded_to(self, form: Form, dtype: DType) -> Form:
        """Return what rounding to ``dtype`` makes of a number."""
        unit = unit_roundoff(dtype)
        self._peaks = np.maximum(self._peaks, form.sizes)
        noise = form.noise * (1 + unit) + unit * np.abs(form.factors)
        return Form(form.factors, noise, form.floor * (1 + unit) + smallest_change(dtype))

    def rounding(self, result: Form, offset: float) -> Rounding | None:
        """Return what was found of a kernel's result before its last rounding; None where a number has outgrown all.

        ``offset`` is the factor of the base less 1, which counts as rounding where a float64 does not hold it.
        """
        slip = 0.0 if offset + 1.0 == result.factors[-1] else _OF_FACTORS
        peaks = np.maximum(self._peaks, result.sizes)
        if not (np.isfinite(result.noise).all() and np.isfinite(peaks).all() and math.isfinite(result.floor)):
            return None
        return Rounding(
            noise=tuple(map(float, result.noise[:-1])),
            base_noise=float(result.noise[-1]) + slip,
            floor=result.floor,
            peaks=tuple(map(float, peaks[:-1])),
            base_peak=float(peaks[-1]),
        )
