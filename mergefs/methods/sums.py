"""Sums as methods ask for them: in F32 in torch's order on one thread, else in float64 and rounded once.

In BF16 and F16 torch adds up in float32, too, but the sums are then rounded to eight or eleven bits.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.kernels.precision import Array, Precision
from mergefs.kernels.sums import row_sums, sums_across
from mergefs.methods.contract import Block, ElementSums, Moments, SingleSums

# The modules of ``mergefs.kernels.fused`` that answer what is asked for.
MOMENTS: Final = ("moments",)
"""Norms and inner products, straight from bytes."""

SUMS: Final = ("arrays", "lanes", "turns")
"""Sums of terms that lie in arrays."""

NORMS: Final = ("arrays", "squares")
"""Norms of them."""

RANKS: Final = ("arrays", "digits")
"""Thresholds and quantiles of them."""

Sums: TypeAlias = ElementSums | SingleSums


def ask_sums(
    compute: DType,
    name: str,
    models: tuple[int, ...],
    terms: Callable[[Block, Precision], Array],
    arguments: tuple[float, ...] = (),
    *,
    fused: Callable[[Block, Precision], Array] | None = None,
    moments: Moments | None = None,
    count: int,
) -> Sums:
    """Ask for the sums of the ``count`` rows of ``terms``, which are values of the compute dtype.

    ``fused`` and ``moments`` are those of ``Quantity``.
    """
    kind = SingleSums if compute == F32 else ElementSums
    return kind(name, models, terms, arguments, fused=fused, moments=moments, count=count)


def sums_of_rows(rows: Array, precision: Precision) -> Array:
    """Return the sum of each row of a matrix of values of ``precision``, not yet rounded to it."""
    if precision.dtype == F32:
        return row_sums(rows.astype(np.float32))
    sums: Array = rows.astype(np.float64).sum(axis=1)
    return sums


def sums_across_vectors(vectors: Array, start: int, size: int, precision: Precision) -> Array:
    """Return the sum of each column of a matrix of values of ``precision``, not yet rounded to it.

    It has all vectors, of ``size`` elements each, from their element ``start`` on.
    """
    if precision.dtype == F32:
        single = vectors.astype(np.float32)
        return row_sums(single.T) if size == 1 else sums_across(single, start, size)
    sums: Array = vectors.astype(np.float64).sum(axis=0)
    return sums
