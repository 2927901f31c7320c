"""The statistics of a tensor in memory, by their plain definitions.

What ``mergefs.statistics`` finds by streaming over files with histograms is here a sort and a sum. The tests hold the
two against each other.
"""

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32
from mergefs.kernels.norms import row_norms
from mergefs.kernels.precision import Array, Precision
from mergefs.kernels.sums import row_sums
from mergefs.methods.contract import (
    Answer,
    Answers,
    ColumnSums,
    ElementNorms,
    ElementQuantile,
    ElementSum,
    ElementSums,
    ElementThreshold,
    MagnitudeRescale,
    MagnitudeThreshold,
    Method,
    Quantity,
    RowValues,
    SingleSums,
    Statistic,
    Threshold,
    Vector,
)
from mergefs.testing.cases import Case

AboutQuantity: TypeAlias = (
    ElementSum | ElementSums | SingleSums | ElementNorms | ElementThreshold | ElementQuantile | RowValues | ColumnSums
)

MOST_PASSES = 64
_SMALLEST_SUM = 1e-7


def gather(method: Method[Any], case: Case) -> tuple[Answers, tuple[Statistic, ...]]:
    """Return the answers to all that ``method`` asks of a tensor, pass by pass, and what it asked for.

    Raises ValueError when it never has enough.
    """
    found: dict[Statistic, Answer] = {}
    wanted = method.statistics(case.context)
    for _ in range(MOST_PASSES):
        if not wanted:
            return Answers(found), tuple(found)
        found |= {statistic: answer(statistic, case) for statistic in wanted}
        wanted = method.further_statistics(case.context, Answers(found))
    raise ValueError(f"after {MOST_PASSES} passes it still asks for {wanted}")


def answer(statistic: Statistic, case: Case) -> Answer:
    """Return the answer to one statistic. Raises ValueError where there can be none."""
    _require_possible(statistic, case)
    with np.errstate(all="ignore"):
        if isinstance(statistic, Quantity):
            return _about_quantity(statistic, terms_of(statistic, case), case.precision)
        inputs = case.values().inputs
        delta = case.precision.round(inputs[statistic.model] - inputs[case.context.base or 0])
        keys = case.precision.magnitude_keys(delta)
        if isinstance(statistic, MagnitudeThreshold):
            return threshold(keys, statistic.keep)
        return _rescale(statistic, delta, keys, case.precision)


def _about_quantity(statistic: AboutQuantity, terms: Array, precision: Precision) -> Answer:
    """Return the answer to a statistic from the terms of all elements."""
    if isinstance(statistic, ElementThreshold):
        return threshold(precision.order_keys(terms), statistic.keep)
    if isinstance(statistic, ElementQuantile):
        return float(np.sort(terms)[statistic.rank])
    if isinstance(statistic, ElementNorms):
        return _norms(statistic, terms.astype(np.float32), precision)
    if isinstance(statistic, SingleSums):
        return row_sums(terms.astype(np.float32)).astype(np.float64)
    if isinstance(statistic, ColumnSums) and statistic.single:
        added: Array = np.add.accumulate(terms.astype(np.float32).reshape(-1, statistic.columns), axis=0)
        return added[-1].astype(np.float64) if added.size else np.zeros(statistic.columns)
    wide: Vector = terms.astype(np.float64)
    if isinstance(statistic, ElementSums | ColumnSums):
        by_sum = wide if isinstance(statistic, ElementSums) else wide.reshape(-1, statistic.columns).T
        totals: Vector = by_sum.sum(axis=1)
        return totals
    return wide if isinstance(statistic, RowValues) else float(wide.sum())


def _norms(statistic: ElementNorms, rows: NDArray[np.float32], precision: Precision) -> Vector:
    """Return the norms of rows, or of the norms of their chunks."""
    dtype = F32 if statistic.widened else precision.dtype
    if statistic.chunk is None:
        return row_norms(rows, dtype).astype(np.float64)
    cuts = range(statistic.chunk, rows.shape[1], statistic.chunk)
    chunks = [row_norms(chunk, dtype) for chunk in np.split(rows, list(cuts), axis=1)]
    return row_norms(np.stack(chunks, axis=1), F32).astype(np.float64)


def terms_of(statistic: AboutQuantity, case: Case, start: int = 0, stop: int | None = None) -> Array:
    """Return the terms of a quantity for a run of elements."""
    with np.errstate(all="ignore"):
        return statistic.terms(case.values(start, stop, statistic.models), case.precision)


def threshold(keys: Any, keep: int) -> Threshold:
    """Return the threshold that the ``keep`` largest keys survive, of equal ones those that come first."""
    order = np.lexsort((np.arange(keys.size), ~keys))
    survivors = order[:keep]
    last = int(keys[survivors[-1]])
    equal = np.flatnonzero(keys == last)
    surviving = np.sort(survivors[keys[survivors] == last])
    return Threshold(last, int(keys.size if surviving.size == equal.size else surviving[-1] + 1))


def _rescale(statistic: MagnitudeRescale, delta: Array, keys: Any, precision: Precision) -> float:
    """Return the ratio of two sums of magnitudes, each rounded to the compute dtype unless that overflows."""
    survives = threshold(keys, statistic.keep).keeps(keys, 0)
    if statistic.beyond:
        survives &= ~threshold(keys, statistic.beyond).keeps(keys, 0)
    magnitudes = np.abs(delta).astype(np.float64)
    before, after = float(magnitudes.sum()), float((magnitudes * survives).sum())
    rounded = [float(precision.scalar(total)) for total in (before, after)]
    if all(map(math.isfinite, rounded)):
        before, after = rounded
    return 1.0 if before < _SMALLEST_SUM or after < _SMALLEST_SUM else before / after


def _require_possible(statistic: Statistic, case: Case) -> None:
    context = case.context
    if isinstance(statistic, Quantity):
        if not statistic.models or not all(0 <= model < context.models for model in statistic.models):
            raise ValueError(f"the sum {statistic.name!r} looks at models {statistic.models} of {context.models}")
        if isinstance(statistic, ElementThreshold) and not 1 <= statistic.keep <= context.size:
            raise ValueError(f"{statistic} keeps more or fewer elements than the {context.size} that there are")
        if isinstance(statistic, ElementQuantile) and not 0 <= statistic.rank < context.size:
            raise ValueError(f"{statistic} asks for a rank among the {context.size} elements that there are")
        return
    if context.base is None or statistic.model not in context.experts:
        raise ValueError(f"{statistic} is about a model that has no delta")
    beyond = statistic.beyond if isinstance(statistic, MagnitudeRescale) else 0
    if not 0 <= beyond <= statistic.keep <= context.size or not statistic.keep:
        raise ValueError(f"{statistic} is about more or fewer elements than the {context.size} that there are")
