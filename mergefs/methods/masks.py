"""Which elements of a delta survive pruning."""

from dataclasses import dataclass

import numpy as np

from mergefs.checkpoint.dtypes import F16, F32
from mergefs.kernels.precision import Array, Precision
from mergefs.kernels.random import UNIFORM_BITS, uniform_integers
from mergefs.methods.contract import Threshold


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Every element of the delta survives."""


@dataclass(frozen=True, slots=True)
class KeepNone:
    """No element of the delta survives (density 0)."""


@dataclass(frozen=True, slots=True)
class KeepLargest:
    """The largest magnitudes of the tensor survive, but for the outliers: those that survive ``outliers`` too."""

    threshold: Threshold
    outliers: Threshold | None = None


@dataclass(frozen=True, slots=True)
class KeepRandom:
    """An element survives when its draw from stream ``key`` is below ``limit``."""

    key: int
    limit: int


@dataclass(frozen=True, slots=True)
class KeepRanked:
    """An element survives with a probability between ``density`` -+ ``epsilon``, by the rank of its magnitude.

    Ranks count within rows of ``row`` elements; draws are those of stream ``key``.
    """

    key: int
    row: int
    density: float
    epsilon: float


Mask = KeepAll | KeepNone | KeepLargest | KeepRandom | KeepRanked


def kept(mask: Mask, delta: Array, start: int, precision: Precision) -> Array:
    """Return 1 for the elements of a run that survive ``mask``, 0 for the others.

    ``delta`` holds values of ``precision``; ``start`` is the flat index of its first element in the tensor.
    """
    if isinstance(mask, KeepAll):
        return np.ones_like(delta)
    if isinstance(mask, KeepNone):
        return np.zeros_like(delta)
    if isinstance(mask, KeepRandom):
        drawn: Array = (uniform_integers(mask.key, start, delta.size) < np.uint32(mask.limit)).astype(delta.dtype)
        return drawn
    if isinstance(mask, KeepRanked):
        return _kept_by_rank(mask, delta, start, precision)
    keys = precision.magnitude_keys(delta)
    survives = mask.threshold.keeps(keys, start)
    if mask.outliers is not None:
        survives &= ~mask.outliers.keeps(keys, start)
    return survives.astype(delta.dtype)


def drawing(precision: Precision) -> Precision:
    """Return the precision that torch draws in: BF16 and F32 as they are, F16 in F32."""
    return Precision(F32) if precision.dtype == F16 else precision


def _kept_by_rank(mask: KeepRanked, delta: Array, start: int, precision: Precision) -> Array:
    """Return 1 where a draw falls below the probability that an element's rank in its row gives, else 0.

    Of equal magnitudes the later ones count as larger.
    """
    order = np.argsort(np.abs(delta).reshape(-1, mask.row), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(mask.row)[None, :], axis=1)
    probability = probabilities(mask, precision)[ranks].reshape(-1)
    draws = uniform_integers(mask.key, start, delta.size)
    return (draws / 2.0**UNIFORM_BITS < probability).astype(delta.dtype)


def probabilities(mask: KeepRanked, precision: Precision) -> Array:
    """Return the probability of each rank of a row, by the steps of rounding that torch takes.

    The smallest magnitude of a row is kept with ``density - epsilon``, the largest with ``density + epsilon``.
    """
    drawn = drawing(precision)
    number = drawn.carrier
    counted = drawn.round(drawn.round(np.arange(mask.row).astype(number)) + number(1))
    least, most = counted.min(), counted.max()
    span = drawn.round(np.array([most - least]))[0]
    # A row of one element has no order: it is kept with the density itself.
    share = drawn.round(drawn.round(counted - least) / span) if span > 0 else np.full(mask.row, number(0.5))
    raised = drawn.round(drawn.round(share * number(2)) * number(mask.epsilon))
    # torch rounds a number that it adds to a tensor first, and one that it multiplies by not.
    return drawn.round(drawn.scalar(mask.density - mask.epsilon) + raised)
