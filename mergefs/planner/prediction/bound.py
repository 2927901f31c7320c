"""By how much a budgeted merge can differ from the full one at most.

Both are computed by one kernel, block by block, from the same base b: the full merge from the deltas d_i of all inputs,
the budgeted one from deltas e_i, which are d_i where a block is bought whole, nothing where it is not bought, and
something near to d_i where planes of it are. What both would be in exact arithmetic differs by at most

    sum_i L_i |d_i - e_i|

in each element, with the largest factors L of the method's response: so by at most ``sum_i L_i rho_i`` in the norm of
the block, where rho_i bounds the norm of d_i - e_i. Where factors depend on the deltas (``fixed`` is not set: what is
pruned by magnitude is dropped or not) that holds for what is left out, while a delta that is known by its planes counts
with both norms.

To that comes what is rounded. Before its last rounding a kernel's result c is off by at most
``sum_i N_i |d_i| + N_b |b| + floor`` (``Rounding``), for either merge. The last roundings, to the dtype that the kernel
ends in and from there to that of the file, each change a number by at most u times its size, u being the unit roundoff
of the dtype. Where that holds every number of the compute dtype, b is one of them: the number next to c is then no
farther from c than b is, so c is changed by at most |c - b|. The smaller of the two counts.

A block whose inputs are all known exactly is the full merge's, bit for bit, and counts nothing. A block that is not
computed is the base's, rounded to the dtype of the file.

Norms come as float32 sums of squares; what their own roundings may have taken off is added again. Blocks are different
elements, so the norm of the whole is the root of the sum of the squares of theirs.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32, F64, DType
from mergefs.methods.contract import Response
from mergefs.methods.rounding import Rounding, largest_number, smallest_change, unit_roundoff
from mergefs.planner.levels import NOTHING
from mergefs.planner.plan import TensorPlan
from mergefs.planner.prediction.evidence import Evidence
from mergefs.planner.prediction.residuals import Residuals

_OF_NORMS: Final = 1 + 2.0**-19
"""By how much norms are raised: their squares are float32, of sums of float64 squares of differences in float32."""
_SMALLEST_NORM: Final = 2.0**-74
"""What a norm may be whose square is too small for a float32."""
_OF_SUMS: Final = 1 + 2.0**-40
"""By how much the result is raised, for the float64 roundings of computing it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Merge:
    """Bounds of one of the two merges: norms of the base (float64 [b]) and of its n deltas (float64 [n, b]).

    ``roots`` (float64 [b]) are the roots of the numbers of elements that are rounded at all.
    """

    base: NDArray[np.float64]
    deltas: NDArray[np.float64]
    roots: NDArray[np.float64]


def bound_of(tensor: TensorPlan, evidence: Evidence, residuals: Residuals) -> float | None:
    """Return a bound of the norm of the error of one tensor, or None where nothing is certain.

    That is so where the method's response knows no largest factors, or no roundings, or where a number could outgrow
    a dtype on the way. Where everything is known exactly the bound is 0, whatever the method.
    """
    affected = residuals.affected
    if not affected.any():
        return 0.0
    response = evidence.response
    if response.largest is None or response.rounding is None or evidence.base is None:
        return None
    full = _full(evidence, response.rounding)
    largest, left = np.array(response.largest), _left(tensor, evidence, residuals)
    read = residuals.in_any_cell(residuals.selection.levels != NOTHING)
    budgeted = _Merge(full.base, np.where(read, full.deltas + left, 0.0), full.roots)
    if not _stays_finite(tensor, evidence, response.rounding, full, left, affected):
        return None
    if not response.fixed:
        left = left + np.where(residuals.in_any_cell(residuals.coarse), 2 * full.deltas, 0.0)
    of_full = _roundings(tensor, response, full)
    computed = largest @ left + of_full + _roundings(tensor, response, budgeted)
    away = _distance_from_base(response, full)
    errors = np.where(residuals.selection.computed, computed, away + of_full + _rounded_base(tensor, full))
    return math.sqrt(float((errors[affected] ** 2).sum())) * _OF_SUMS


def _full(evidence: Evidence, rounding: Rounding) -> _Merge:
    """Return the bounds of the full merge."""
    if evidence.base is None:
        raise ValueError("the norms of the base are not known")
    rounded = evidence.sizes
    if rounding.base_noise == 0 and evidence.response.offset == 0:
        rounded = np.minimum(rounded, evidence.changed.sum(axis=0))  # where nothing changed, sums are exact
    deltas = np.where(evidence.changed > 0, _norms(evidence.energies), 0.0)
    return _Merge(_norms(evidence.base), deltas, np.sqrt(rounded))


def _norms(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return bounds of norms whose squares are ``squares``, rounded to float32."""
    raised: NDArray[np.float64] = np.sqrt(squares) * _OF_NORMS + _SMALLEST_NORM
    return raised


def _left(tensor: TensorPlan, evidence: Evidence, residuals: Residuals) -> NDArray[np.float64]:
    """Return bounds (float64 [n, b]) of the norms of what is left of each delta in each block.

    The energies of single cells are certain where they come from planes; without these all of a block is taken as left
    where a cell of it is.
    """
    left = residuals.by_block(residuals.left)
    missing = residuals.in_any_cell(residuals.selection.levels == NOTHING)
    for index in range(len(tensor.places)):
        if not tensor.coded or tensor.coded[index] is None:
            left[index] = np.where(missing[index], evidence.energies[index], 0.0)
    anything = (missing | residuals.in_any_cell(residuals.coarse)) & (evidence.changed > 0)
    return np.where(anything, _norms(left), 0.0)


def _distance_from_base(response: Response, merge: _Merge) -> NDArray[np.float64]:
    """Return bounds of the distance of the exact merge from the base."""
    distance: NDArray[np.float64] = abs(response.offset) * merge.base + np.array(response.largest) @ merge.deltas
    return distance


def _roundings(tensor: TensorPlan, response: Response, merge: _Merge) -> NDArray[np.float64]:
    """Return bounds of the distance of a computed merge from the exact one."""
    rounding = response.rounding
    if rounding is None or tensor.method is None:
        raise ValueError("the roundings of the method are not known")
    noise = np.array(rounding.noise) @ merge.deltas + rounding.base_noise * merge.base + rounding.floor * merge.roots
    away = _distance_from_base(response, merge) + noise
    size = abs(1 + response.offset) * merge.base + np.array(response.largest) @ merge.deltas + noise
    moved: NDArray[np.float64] = noise
    for dtype in _steps(tensor.compute, tensor.method.result_dtype(tensor.compute), tensor.dtype):
        holds_base = _holds(dtype, tensor.compute)
        if holds_base and _is_one_input(response):
            continue
        further = moved - noise
        change = unit_roundoff(dtype) * (size + further) + smallest_change(dtype) * merge.roots
        moved = moved + (np.minimum(change, away + further) if holds_base else change)
    return moved


def _is_one_input(response: Response) -> bool:
    """Return whether a merge is one of its inputs as it is."""
    rounding = response.rounding
    exact = rounding is not None and not any(rounding.noise) and rounding.base_noise == 0 and response.offset == 0
    return exact and response.fixed and sorted(response.factors) == [0.0] * (len(response.factors) - 1) + [1.0]


def _rounded_base(tensor: TensorPlan, merge: _Merge) -> NDArray[np.float64]:
    """Return bounds of what rounding to the dtype of the file does to the base."""
    moved: NDArray[np.float64] = np.zeros_like(merge.base)
    for dtype in _steps(tensor.compute, tensor.compute, tensor.dtype):
        if not _holds(dtype, tensor.compute):
            moved = moved + unit_roundoff(dtype) * (merge.base + moved) + smallest_change(dtype) * merge.roots
    return moved


def _steps(compute: DType, result: DType, out: DType) -> list[DType]:
    """Return the dtypes that the exact result of a kernel is rounded to, one after the other."""
    steps = [result] if result.bits > 16 else [F32, result]
    if not _holds(out, result):
        steps += [F32, out] if result == F64 and out.bits == 16 else [out]
    return steps


def _holds(dtype: DType, other: DType) -> bool:
    """Return whether every number of ``other`` is one of ``dtype``."""
    return dtype in (other, F64) or (dtype == F32 and other.bits == 16)


def _stays_finite(
    tensor: TensorPlan,
    evidence: Evidence,
    rounding: Rounding,
    full: _Merge,
    left: NDArray[np.float64],
    affected: NDArray[np.bool_],
) -> bool:
    """Return whether no number on the way to either merge can outgrow its dtype."""
    if tensor.method is None:
        return False
    largest = evidence.largest * _OF_NORMS + left
    sizes = np.array(rounding.peaks) @ largest + rounding.base_peak * full.base + rounding.floor
    dtypes = (tensor.compute, tensor.method.result_dtype(tensor.compute), tensor.dtype)
    limit = min(*map(largest_number, dtypes), largest_number(F32))  # statistics end at the largest float32
    return bool((sizes[affected] < limit).all())
