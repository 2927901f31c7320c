"""Weighted averages: linear (Wortsman et al. 2022, "Model soups", arXiv 2203.05482)."""

from dataclasses import dataclass

import numpy as np

from mergefs.errors import RecipeError
from mergefs.kernels.arithmetic import fused_multiply_add
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.methods.contract import (
    NO_ANSWERS,
    Answers,
    BasePolicy,
    Block,
    Method,
    Parameter,
    RawRun,
    Response,
    Scope,
    Specification,
    TensorContext,
)
from mergefs.methods.rounding import Analysis


@dataclass(frozen=True, slots=True)
class LinearCoefficients:
    """One weight for each input, and what the weighted sum is divided by (None: by nothing)."""

    weights: tuple[float, ...]
    divisor: float | None


class Linear(Method[LinearCoefficients]):
    """``sum(w_i * x_i) / sum(w_i)``, accumulated by fused multiply-add in float32 (float64 for F64), rounded once."""

    specification = Specification(
        name="linear",
        title="Linear",
        reference="https://arxiv.org/abs/2203.05482",
        summary="The weighted average of the models.",
        parameters=(
            Parameter("weight", "float", Scope.PER_MODEL, "weight of the model in the sum", required=True),
            Parameter("normalize", "bool", Scope.GLOBAL, "divide by the sum of the weights", default=True),
        ),
        base=BasePolicy.AS_INPUT,
    )

    def check(self, context: TensorContext) -> None:
        """Refuse weights that sum to zero where the sum is the divisor."""
        coefficients = self.coefficients(context, NO_ANSWERS)
        if coefficients.divisor == 0:
            raise RecipeError(
                f"the weights for tensor {context.name!r} sum to 0 and `normalize` divides by that sum; "
                "change a `weight`, or set `normalize: false`"
            )

    def coefficients(self, context: TensorContext, answers: Answers) -> LinearCoefficients:
        """Round the weights, and their sum, to the type that the sum is accumulated in."""
        carrier = Precision(context.compute).carrier
        weights = [carrier(context.number("weight", model)) for model in range(context.models)]
        total = carrier(0)
        for weight in weights:
            total = carrier(total + weight)
        normalize = bool(context.shared["normalize"])
        return LinearCoefficients(tuple(float(w) for w in weights), float(total) if normalize else None)

    def reference(self, block: Block, coefficients: LinearCoefficients, precision: Precision) -> Array:
        """Accumulate in the order of the recipe, divide, round."""
        carrier = precision.carrier
        total: Array = np.zeros(block.inputs[0].size, dtype=carrier)
        for values, weight in zip(block.inputs, coefficients.weights, strict=True):
            total = fused_multiply_add(values, weight, total)
        if coefficients.divisor is not None:
            total = total / carrier(coefficients.divisor)
        return precision.round(total)

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes."""
        return ("weighted_average",)

    def fused(self, run: RawRun, coefficients: LinearCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES:
            return None
        import mergefs.kernels.fused.weighted_average as kernel
        from mergefs.kernels.fused.memory import addresses, empty_result

        divisor = coefficients.divisor
        result = empty_result(run.inputs[0], run.dtype, run.into)
        kernel.KERNEL.compiled(run.dtype)(
            result,
            addresses(run.inputs),
            np.array(coefficients.weights, dtype=np.float32),
            divisor is not None,
            1.0 if divisor is None else divisor,
            np.empty(kernel.TILE, dtype=np.float32),
        )
        return result.view(np.uint8)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Linear, with the weights after normalisation."""
        coefficients = self.coefficients(context, answers)
        analysis = Analysis(context.models, context.base, context.compute)
        total = analysis.zero()
        for model, weight in enumerate(coefficients.weights):
            total = analysis.carried(total + analysis.input(model) * weight)
        if coefficients.divisor is not None:
            total = analysis.carried(total / coefficients.divisor)
        return Response.linear(analysis, total)
