"""Sums of squares over two runs of elements, from which distances follow."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F64, DType
from mergefs.kernels.precision import Raw, load

_TILE: Final = 64 * 1024
"""Elements that are worked on at once, so that their float64 values stay in the CPU's cache."""
_INTEGERS: Final = {"BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4"} | {
    "U64": "u8",
    "I64": "i8",
}


@dataclass(frozen=True, slots=True)
class Squares:
    """Of a run of elements of two tensors a and b: the sums of (a-b)^2 and of b^2, in float64."""

    difference: float
    norm: float


def comparable(dtype: DType) -> bool:
    """Return whether the elements of a dtype are numbers that have a distance; quantised codes have none."""
    return dtype.kind in ("float", "complex") or dtype.name in _INTEGERS


def squares(a: Raw, dtype_a: DType, b: Raw, dtype_b: DType) -> Squares:
    """Return the sums over a run of elements, given its bytes in either tensor; both dtypes must be ``comparable``.

    Where all bytes are equal the difference is 0, whatever NaN they hold. What overflows float64 is infinite.
    """
    equal = dtype_a == dtype_b and bool(np.array_equal(a, b))
    width_a, width_b = dtype_a.itemsize, dtype_b.itemsize
    differences, norms = [], []
    with np.errstate(all="ignore"):
        for first in range(0, b.size // width_b, _TILE):
            last = first + _TILE
            values = _values(b[first * width_b : last * width_b], dtype_b)
            norms.append(float((values * values).sum()))
            if not equal:
                delta = _values(a[first * width_a : last * width_a], dtype_a) - values
                differences.append(float((delta * delta).sum()))
    return Squares(_total(differences), _total(norms))


def add(parts: Iterable[Squares]) -> Squares:
    """Return the sums over several runs."""
    listed = list(parts)
    return Squares(_total(part.difference for part in listed), _total(part.norm for part in listed))


def _total(numbers: Iterable[float]) -> float:
    """Return an exact sum, rounded once, which does not depend on order; infinite or NaN where one of them is."""
    listed = list(numbers)
    try:
        return math.fsum(listed)
    except OverflowError:
        return math.inf
    except ValueError:  # infinities of both signs, which squares are not
        return math.nan


def _values(raw: Raw, dtype: DType) -> NDArray[np.float64]:
    """Return elements as float64; a complex number is two of them."""
    values: NDArray[np.float64]
    if dtype.kind == "complex":
        values = raw.view(np.float32).astype(np.float64)
    elif dtype.is_float:
        values = load(raw, dtype, F64).astype(np.float64, copy=False)
    else:
        values = raw.view(_INTEGERS[dtype.name]).astype(np.float64)
    return values
