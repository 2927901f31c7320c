"""What a selection is expected to leave of a merge that is linear in the deltas, or that behaves about like one."""

from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.methods.contract import Response
from mergefs.methods.rounding import unit_roundoff
from mergefs.planner.plan import TensorPlan
from mergefs.planner.prediction.evidence import Evidence
from mergefs.planner.prediction.quantised import rounded_change
from mergefs.planner.prediction.residuals import Residuals

_RMS: Final = 0.045
"""The mean square of what roundings before the last one add, beside the square of what they add at most.

That of one is 0.18 of the square of its unit for numbers of all sizes, and four of the same weight are taken to add up.
"""


_MEAN_UNIT: Final = 2.16
"""The mean square of the unit in the last place, beside that of numbers of all sizes and of their unit roundoff."""
_SMALL_NOISE: Final = 0.01
"""Up to this share of the merged delta's squared norm, what is rounded on the way is small."""


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """Squared norms that are expected of each block (float64 [b]): of the ``error``, and of the whole ``merged`` delta.

    The merged delta is the full merge less the base. ``certain_enough`` says that this is a prediction by itself: the
    merge is linear in the deltas, and what its kernel rounds before the last rounding is small beside the result.
    """

    error: NDArray[np.float64]
    merged: NDArray[np.float64]
    certain_enough: bool


def expected(tensor: TensorPlan, evidence: Evidence, residuals: Residuals) -> Expected:
    """Return what is expected of the blocks of one tensor.

    With factors f, spreads s, the Gram matrix G of the deltas and the share u_i of its energy that is left of each
    delta, the error of a cell is ``sum_i (f_i^2 + s_i) u_i G_ii + sum_{i != j} f_i f_j u_i u_j G_ij``: what a delta is
    known by is about orthogonal to what is left of it. A block of which nothing is computed lacks the offset of the
    base beside.
    """
    response = evidence.response
    factors, spreads = np.array(response.factors), np.array(response.spreads)
    own = (factors * factors + spreads)[:, np.newaxis]
    computed = residuals.selection.computed
    error = residuals.by_block((own * residuals.left).sum(axis=0))
    merged = (own * evidence.energies).sum(axis=0)
    shares = residuals.left / np.where(residuals.energies > 0, residuals.energies, 1.0)
    for first, second in combinations(np.flatnonzero(factors), 2):
        lengths = np.sqrt(evidence.energies[first] * evidence.energies[second])
        product = 2 * factors[first] * factors[second] * evidence.correlations[:, first, second] * lengths
        merged = merged + product
        error = error + product * _common_share(residuals, shares, int(first), int(second))
    if evidence.base is not None and abs(response.offset) > 0.5 * unit_roundoff(tensor.dtype):
        beside = response.offset**2 * evidence.base
        merged = merged + beside
        error = error + np.where(computed, 0.0, beside)
    exact = Expected(np.maximum(error, 0.0), np.maximum(merged, 0.0), response.fixed)
    return _rounded(tensor, evidence, residuals, exact)


def _rounded(tensor: TensorPlan, evidence: Evidence, residuals: Residuals, exact: Expected) -> Expected:
    """Return what is expected after the last rounding, and with what is rounded before it where that is known."""
    response, base = evidence.response, evidence.base
    if base is None or tensor.stand_in is None or _keeps_the_grid(tensor, response):
        return exact
    on_grid = tensor.dtype in (tensor.compute, tensor.stand_in.dtype) or tensor.dtype.bits > tensor.compute.bits
    sizes = np.maximum(evidence.sizes, 1)
    weighs = np.array(response.factors) != 0
    computed = residuals.selection.computed
    noise = np.zeros_like(base) if response.rounding is None else _RMS * response.rounding.base_noise**2 * base

    def after(change: NDArray[np.float64], beside: NDArray[np.float64], of: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a change of the blocks, which as many elements have as inputs have in ``of`` (float64 [n, b])."""
        changed = np.minimum(of[weighs].sum(axis=0), sizes)
        changed = np.maximum(changed, 1) if response.offset == 0 else sizes
        rounded = rounded_change(change / changed, beside / sizes, base / sizes, tensor.dtype, on_grid) * changed
        kept: NDArray[np.float64] = np.where(change > 0, rounded, 0.0)
        return kept

    nothing = np.zeros_like(base)
    merged = after(exact.merged + noise, nothing, evidence.changed.astype(np.float64))
    twice = np.where(exact.error > 0, exact.error + 2 * noise, 0.0)
    partly = after(twice, np.maximum(exact.merged - exact.error, 0.0), _unlike(tensor, evidence, residuals, base))
    small = float(noise.sum()) <= _SMALL_NOISE * float(exact.merged.sum())
    return Expected(np.where(computed, partly, merged), merged, response.fixed and small)


def _unlike(
    tensor: TensorPlan, evidence: Evidence, residuals: Residuals, base: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how many elements (float64 [n, b]) of each input are expected not to be what they are in the full merge.

    What planes decode to is rounded to the compute dtype too: so where little is left, most elements are right and the
    others are off by a unit in the last place.
    """
    left = residuals.by_block(residuals.left)
    units = _MEAN_UNIT * unit_roundoff(tensor.compute) ** 2 * base / np.maximum(evidence.sizes, 1)
    by_units = left / np.maximum(units, np.finfo(np.float64).tiny)
    coarse = residuals.in_any_cell(residuals.coarse)
    unlike: NDArray[np.float64] = np.where(coarse, np.minimum(evidence.changed, by_units), evidence.changed)
    return np.where(left > 0, unlike, 0.0)


def _keeps_the_grid(tensor: TensorPlan, response: Response) -> bool:
    """Return whether sums and differences of inputs are all that is computed, which have numbers of their own dtype."""
    signs = all(factor in (-1.0, 0.0, 1.0) for factor in response.factors)
    return response.fixed and signs and not any(response.spreads) and response.offset == 0


def _common_share(residuals: Residuals, shares: NDArray[np.float64], first: int, second: int) -> NDArray[np.float64]:
    """Return which share of two deltas' inner product is left in each block; cells count by their common energy.

    Of inputs with the same bytes the same is left; what is left of others has little to do with each other.
    """
    givers = residuals.selection.givers
    per_block = residuals.selection.grid.step // residuals.selection.cell
    alike = np.repeat(givers[first] == givers[second], per_block)[: shares.shape[1]]
    common: NDArray[np.float64] = shares[first] * np.where(alike, 1.0, shares[second])
    if residuals.selection.cell == residuals.selection.grid.step:
        return common
    weights = np.sqrt(residuals.energies[first] * residuals.energies[second])
    total = residuals.by_block(weights)
    found: NDArray[np.float64] = residuals.by_block(weights * common) / np.where(total > 0, total, 1.0)
    return found
