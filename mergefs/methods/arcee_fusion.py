"""Arcee Fusion: take over from the other model only what matters, by size of the change and divergence of its row."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.errors import RecipeError
from mergefs.kernels.elementary import exponential, logarithm
from mergefs.kernels.precision import Array, Precision
from mergefs.methods.contract import (
    LONGEST_ROW,
    Answers,
    BasePolicy,
    Block,
    ElementQuantile,
    FewModels,
    Method,
    Response,
    RowValues,
    Specification,
    Statistic,
    TensorContext,
    Vector,
)
from mergefs.methods.rounding import Analysis

_SMALLEST_PROBABILITY: Final = 1e-8
_BEYOND_QUARTILES: Final = 1.5


@dataclass(frozen=True, slots=True)
class ArceeFusionCoefficients:
    """The divergence of each row of ``row`` elements, and from which importance on a change is taken over."""

    base: int
    other: int
    row: int
    divergences: Vector
    threshold: float


class ArceeFusion(Method[ArceeFusionCoefficients]):
    """``base + (x - base)`` where ``|x - base| * KL(row)`` is at least ``median + 1.5 * (third - first quartile)``.

    The mask is a float32, and so is the sum: the result is rounded once, to the output dtype.
    """

    specification = Specification(
        name="arcee_fusion",
        title="Arcee Fusion",
        reference="https://arcee.ai",
        summary="Takes over what matters most in the other model, by size of the change and divergence of its row.",
        parameters=(),
        base=BasePolicy.REQUIRED,
        min_models=2,
        max_models=2,
        few_models=FewModels.TAKE_ONE,
        needs="the divergence of each row's softmax, then the quartiles of the importance that follows",
    )

    def check(self, context: TensorContext) -> None:
        """Refuse rows that are too long to be seen whole."""
        if context.row > LONGEST_ROW:
            raise RecipeError(
                f"tensor {context.name!r} has rows of {context.row} elements, and arcee_fusion takes rows of at most "
                f"{LONGEST_ROW}; choose a method that does not work by rows"
            )

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """The divergence of each row."""
        return (_divergences(context),) if context.size else ()

    def further_statistics(self, context: TensorContext, answers: Answers) -> tuple[Statistic, ...]:
        """The quartiles of the importance, which is known once the divergences are."""
        if not context.size:
            return ()
        return tuple(wanted for wanted in _quartiles(context, answers) if wanted not in answers)

    def coefficients(self, context: TensorContext, answers: Answers) -> ArceeFusionCoefficients:
        """Turn the quartiles into a threshold, by the steps of rounding that torch takes."""
        base, other = _pair(context)
        if not context.size:
            return ArceeFusionCoefficients(base, other, context.row, np.zeros(0, dtype=np.float64), 0.0)
        precision = Precision(context.compute)
        kind = precision.carrier
        first, median, third = (kind(answers.number(wanted)) for wanted in _quartiles(context, answers))
        with np.errstate(all="ignore"):
            spread = precision.scalar(kind(_BEYOND_QUARTILES) * precision.scalar(third - first))
            threshold = float(precision.scalar(median + spread))
        divergences = answers.vector(_divergences(context))
        return ArceeFusionCoefficients(base, other, context.row, divergences, threshold)

    def result_dtype(self, compute: DType) -> DType:
        """The mask makes float32 of the 16 bit types."""
        return F32 if compute.bits == 16 else compute

    def reference(self, block: Block, coefficients: ArceeFusionCoefficients, precision: Precision) -> Array:
        """Take the changes over that are important enough."""
        base, other = block.inputs[coefficients.base], block.inputs[coefficients.other]
        delta = precision.round(other - base)
        importance = _importance(delta, coefficients.divergences, block.start, coefficients.row, precision)
        taken = (importance >= coefficients.threshold).astype(base.dtype)
        return base + delta * taken

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """At most 1 for the other model, where its change is important."""
        analysis = Analysis(context.models, context.base, context.compute)
        whole = analysis.base() + analysis.delta(context.experts[0])
        return replace(Response.linear(analysis, whole), fixed=False)


def _pair(context: TensorContext) -> tuple[int, int]:
    """Return the indices of the base and of the other model."""
    if context.base is None:
        raise ValueError("arcee_fusion needs a base")
    return context.base, context.experts[0]


def _divergences(context: TensorContext) -> RowValues:
    """Ask for the divergence of each row of the other model from that of the base."""
    row = context.row
    terms = partial(_divergences_of_rows, row=row)
    return RowValues("divergence of softmax", _pair(context), terms, row=row)


def _divergences_of_rows(block: Block, precision: Precision, row: int) -> Array:
    """Return the Kullback-Leibler divergence of the softmax of each row, rounding as torch does."""
    least = precision.scalar(_SMALLEST_PROBABILITY)
    base, other = (precision.round(_softmax(values.reshape(-1, row), precision) + least) for values in block.inputs)
    ratios = precision.round(logarithm(precision.round(other / base)).astype(precision.carrier))
    sums = precision.round(other * ratios).astype(np.float64).sum(axis=1)
    return precision.round(sums.astype(precision.carrier))


def _softmax(rows: Array, precision: Precision) -> Array:
    """Return the softmax of each row: taken in float32 (float64 for F64) and rounded once."""
    kind = precision.carrier
    powers = exponential(rows - rows.max(axis=1, keepdims=True)).astype(kind)
    sums = powers.astype(np.float64).sum(axis=1, keepdims=True).astype(kind)
    return precision.round(powers / sums)


def _importance(delta: Array, divergences: Vector, start: int, row: int, precision: Precision) -> Array:
    """Return how important the changes of a run of elements are."""
    rows = np.arange(start, start + delta.size) // row
    return precision.round(np.abs(delta) * divergences.astype(delta.dtype)[rows])


def _quartiles(context: TensorContext, answers: Answers) -> tuple[ElementQuantile, ...]:
    """Ask for the quartiles of the importance, at the ranks that mergekit takes them from."""
    divergences = answers.vector(_divergences(context))

    def importance(block: Block, precision: Precision) -> Array:
        base, other = block.inputs
        return _importance(precision.round(other - base), divergences, block.start, context.row, precision)

    arguments = (float(context.row),)
    return tuple(
        ElementQuantile("importance", _pair(context), importance, arguments, rank=quarter * (context.size - 1) // 4)
        for quarter in (1, 2, 3)
    )
