"""NearSwap: take from the second model what is near to the first (alchemonaut 2024, QuartetAnemoi-70B)."""

from dataclasses import dataclass, replace

import numpy as np

from mergefs.checkpoint.dtypes import F16
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.methods.contract import (
    Answers,
    BasePolicy,
    Block,
    FewModels,
    Method,
    Parameter,
    RawRun,
    Response,
    Scope,
    Specification,
    TensorContext,
)
from mergefs.methods.rounding import Analysis

_SMALLEST_DISTANCE = 1e-6


@dataclass(frozen=True, slots=True)
class NearSwapCoefficients:
    """The distance at which the second model begins to lose its say."""

    base: int
    other: int
    t: float


class NearSwap(Method[NearSwapCoefficients]):
    """``w * b + (1 - w) * a`` with ``w = clamp(t / |a - b|, 0, 1)``, in the compute dtype."""

    specification = Specification(
        name="nearswap",
        title="NearSwap",
        reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        summary="Takes over those elements of the other model that are near to the base's.",
        parameters=(
            Parameter("t", "float", Scope.GLOBAL, "distance up to which the other model is taken whole", required=True),
        ),
        base=BasePolicy.REQUIRED,
        min_models=2,
        max_models=2,
        few_models=FewModels.TAKE_BASE,
    )

    def coefficients(self, context: TensorContext, answers: Answers) -> NearSwapCoefficients:
        """Take the parameter as it is."""
        if context.base is None:
            raise ValueError("nearswap needs a base")
        return NearSwapCoefficients(context.base, context.experts[0], context.number("t"))

    def reference(self, block: Block, coefficients: NearSwapCoefficients, precision: Precision) -> Array:
        """Follow the formula, rounding after each step; torch divides a number by a tensor by way of the reciprocal."""
        first, second = block.inputs[coefficients.base], block.inputs[coefficients.other]
        one = first.dtype.type(1)
        distance = np.maximum(np.abs(precision.round(first - second)), precision.scalar(_SMALLEST_DISTANCE))
        weight = precision.round(precision.round(one / distance) * first.dtype.type(coefficients.t))
        weight = np.clip(weight, 0, 1)
        rest = precision.round(one - weight)
        return precision.round(precision.round(weight * second) + precision.round(rest * first))

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes."""
        return ("nearswap",)

    def fused(self, run: RawRun, coefficients: NearSwapCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES:
            return None
        import mergefs.kernels.fused.nearswap as kernel
        from mergefs.kernels.fused.memory import addresses, empty_result

        pair = (run.inputs[coefficients.base], run.inputs[coefficients.other])
        result = empty_result(pair[0], run.dtype, run.into)
        least = Precision(run.dtype).scalar(_SMALLEST_DISTANCE)
        kernel.KERNEL.compiled(run.dtype)(result, addresses(pair), np.float32(coefficients.t), least)
        return result.view(np.uint8)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """At most 1 for the other model, where it is near.

        The two products that are rounded have the weights w and 1 - w, the second of which is rounded itself: together
        they are off by no more than the other model would be that is rounded twice.
        """
        expected = [0.0 if model == context.base else 1.0 for model in range(context.models)]
        if context.compute == F16 and np.float32(context.number("t")) == 0:
            return Response.estimated(expected)  # the reciprocal of the smallest distance is infinite, and NaN times 0
        analysis = Analysis(context.models, context.base, context.compute)
        whole = analysis.rounded(analysis.rounded(analysis.input(context.experts[0])))
        return replace(Response.linear(analysis, whole), fixed=False)
