"""Spherical linear interpolation of two models (Shoemake 1985, "Animating rotation with quaternion curves")."""

import math
from dataclasses import dataclass

import numpy as np

from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.methods.contract import (
    Answers,
    BasePolicy,
    Block,
    ElementSum,
    FewModels,
    Method,
    Moments,
    Parameter,
    RawRun,
    Response,
    Scope,
    Specification,
    Statistic,
    TensorContext,
)
from mergefs.methods.norms import Norms, ask_norms, known_norms
from mergefs.methods.rounding import Analysis
from mergefs.methods.sums import MOMENTS

_COLINEAR = 0.9995
_SMALLEST_NORM = 1e-8
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class SlerpCoefficients:
    """``first`` times the base plus ``second`` times the other model."""

    base: int
    other: int
    first: float
    second: float


class Slerp(Method[SlerpCoefficients]):
    """Moves on the great circle between base (t = 0) and the other model (t = 1); on a line if colinear."""

    specification = Specification(
        name="slerp",
        title="SLERP",
        reference="https://en.wikipedia.org/wiki/Slerp",
        summary="Spherical interpolation between the base and one other model.",
        parameters=(Parameter("t", "float", Scope.GLOBAL, "0 gives the base, 1 the other model", required=True),),
        base=BasePolicy.REQUIRED,
        min_models=2,
        max_models=2,
        few_models=FewModels.TAKE_ONE,
        needs="the norms of both tensors and their inner product",
    )

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """Both norms and the inner product."""
        return (self._norms(context), inner_product(*self._pair(context)))

    def _norms(self, context: TensorContext) -> Norms:
        """Ask for both norms, which mergekit takes of so many elements at a time."""
        pair = self._pair(context)
        return ask_norms(
            context.compute, "values", pair, _values, moments=Moments(), count=2, widened=True, chunk=_CHUNK
        )

    @staticmethod
    def _pair(context: TensorContext) -> tuple[int, int]:
        """Return the indices of the base and of the other model."""
        if context.base is None:
            raise ValueError("slerp needs a base")
        return context.base, context.experts[0]

    def coefficients(self, context: TensorContext, answers: Answers) -> SlerpCoefficients:
        """Turn the angle into two factors, by the same float32 steps that torch takes (float64 for F64)."""
        base, other = self._pair(context)
        kind = Precision(context.compute).carrier
        norms = [norm if norm > _SMALLEST_NORM else 1.0 for norm in known_norms(answers, self._norms(context))]
        product = answers.number(inner_product(base, other))
        cosine = kind(min(1.0, max(-1.0, product / norms[0] / norms[1])))
        t = kind(context.number("t"))
        rest = kind(1) - t
        # A NaN in the data must not fail a read: it makes every comparison false and flows into the factors.
        if abs(cosine) > kind(_COLINEAR):
            return SlerpCoefficients(base, other, float(rest), float(t))
        angle = kind(math.acos(cosine))
        sine = kind(math.sin(angle))
        first = kind(kind(_sine(kind(rest * angle))) / sine)
        second = kind(kind(_sine(kind(t * angle))) / sine)
        return SlerpCoefficients(base, other, float(first), float(second))

    def reference(self, block: Block, coefficients: SlerpCoefficients, precision: Precision) -> Array:
        """Return ``first * base + second * other``, rounded once."""
        kind = precision.carrier
        base: Array = block.inputs[coefficients.base] * kind(coefficients.first)
        other: Array = block.inputs[coefficients.other] * kind(coefficients.second)
        return precision.round(np.add(base, other))

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes for a merge, and one for what it needs to know."""
        return ("two_factors", *MOMENTS)

    def fused(self, run: RawRun, coefficients: SlerpCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES:
            return None
        import mergefs.kernels.fused.two_factors as kernel
        from mergefs.kernels.fused.memory import addresses, empty_result

        pair = (run.inputs[coefficients.base], run.inputs[coefficients.other])
        result = empty_result(pair[0], run.dtype, run.into)
        factors = np.array([coefficients.first, coefficients.second], dtype=np.float32)
        kernel.KERNEL.compiled(run.dtype)(result, addresses(pair), factors)
        return result.view(np.uint8)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Linear, with the two factors that the angle gives."""
        coefficients = self.coefficients(context, answers)
        analysis = Analysis(context.models, context.base, context.compute)
        base = analysis.carried(analysis.base() * coefficients.first)
        other = analysis.carried(analysis.input(coefficients.other) * coefficients.second)
        return Response.linear(analysis, base + other)


def _sine(angle: float) -> float:
    """Return the sine; NaN for an angle that has grown to infinity, as of a huge t."""
    return math.nan if math.isinf(angle) else math.sin(angle)


def inner_product(first: int, second: int) -> ElementSum:
    """Ask for the inner product of two inputs over a whole tensor."""
    return ElementSum("inner product", (first, second), _products, moments=Moments(pairs=((0, 1),), exact=True))


def _values(block: Block, precision: Precision) -> Array:
    return np.stack(block.inputs)


def _products(block: Block, precision: Precision) -> Array:
    """Return the products of two inputs, exact for all types but F64."""
    return block.inputs[0].astype(np.float64) * block.inputs[1]
