"""Arcee Fusion: take over from the other model only what matters, by size of the change and divergence of its row."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from mergefs.checkpoint.dtypes import F32, DType
from mergefs.errors import RecipeError
from mergefs.kernels.elementary import exponential, logarithm
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.kernels.sums import LaneSums
from mergefs.methods.contract import (
    LONGEST_ROW,
    Answers,
    BasePolicy,
    Block,
    ElementQuantile,
    FewModels,
    Method,
    RawRun,
    Response,
    RowValues,
    Specification,
    Statistic,
    TensorContext,
    Vector,
)
from mergefs.methods.rounding import Analysis
from mergefs.methods.sums import RANKS

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

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes for a merge, one for the divergences, and one for the quartiles."""
        return ("arcee_fusion", *RANKS)

    def fused(self, run: RawRun, coefficients: ArceeFusionCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES:
            return None
        from mergefs.kernels.fused.arcee_fusion import merge

        base, other = run.inputs[coefficients.base], run.inputs[coefficients.other]
        divergences = coefficients.divergences.astype(np.float32)
        return merge(run.dtype, base, other, divergences, coefficients.row, run.start, coefficients.threshold)

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
    terms, fused = (partial(way, row=row) for way in (_divergences_of_rows, _divergences_fused))
    return RowValues("divergence of softmax", _pair(context), terms, fused=fused, row=row)


def _divergences_of_rows(block: Block, precision: Precision, row: int) -> Array:
    """Return the Kullback-Leibler divergence of the softmax of each row, rounding as torch does."""
    least = precision.scalar(_SMALLEST_PROBABILITY)
    base, other = (precision.round(_softmax(values.reshape(-1, row), precision) + least) for values in block.inputs)
    ratios = precision.round(logarithm(precision.round(other / base)).astype(precision.carrier))
    sums = _sums(precision.round(other * ratios))
    return precision.round(sums.astype(precision.carrier))


def _sums(rows: Array) -> Vector:
    """Return the sum of each row, in float64."""
    return LaneSums.begin(len(rows)).add(rows).finish()


def _raws(block: Block) -> list[Raw]:
    """Return the inputs of a block as bytes of float32."""
    return [np.ascontiguousarray(values, dtype=np.float32).view(np.uint8) for values in block.inputs]


def _divergences_fused(block: Block, precision: Precision, row: int) -> Array:
    """Do the same in one pass."""
    from mergefs.kernels.fused.arcee_fusion import divergences

    least = float(precision.scalar(_SMALLEST_PROBABILITY))
    base, other = _raws(block)
    return divergences(precision.dtype, base, other, row, least)


def _softmax(rows: Array, precision: Precision) -> Array:
    """Return the softmax of each row: taken in float32 (float64 for F64) and rounded once."""
    kind = precision.carrier
    powers: Array = exponential(rows - rows.max(axis=1, keepdims=True)).astype(kind)
    sums: Array = _sums(powers).astype(kind)
    return precision.round(powers / sums[:, None])


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

    def importance_fused(block: Block, precision: Precision) -> Array:
        from mergefs.kernels.fused.arcee_fusion import importance

        of_rows = divergences.astype(np.float32)
        base, other = _raws(block)
        return importance(precision.dtype, base, other, of_rows, context.row, block.start)

    pair, arguments, last = _pair(context), (float(context.row),), context.size - 1
    return tuple(
        ElementQuantile("importance", pair, importance, arguments, fused=importance_fused, rank=quarter * last // 4)
        for quarter in (1, 2, 3)
    )
