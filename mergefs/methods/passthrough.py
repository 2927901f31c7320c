"""One model as it is, or scaled."""

from dataclasses import dataclass

from mergefs.kernels.precision import Array, Precision
from mergefs.methods.contract import (
    Answers,
    BasePolicy,
    Block,
    Method,
    Parameter,
    Response,
    Scope,
    Specification,
    TensorContext,
)
from mergefs.methods.rounding import Analysis


@dataclass(frozen=True, slots=True)
class PassthroughCoefficients:
    """What the model is multiplied by (None: nothing)."""

    scale: float | None


class Passthrough(Method[PassthroughCoefficients]):
    """The model's own tensors, times ``scale`` where one is given."""

    specification = Specification(
        name="passthrough",
        title="Passthrough",
        reference="https://github.com/arcee-ai/mergekit",
        summary="One model as it is, or scaled.",
        parameters=(Parameter("scale", "float", Scope.PER_MODEL, "factor for the tensor; none leaves it as it is"),),
        base=BasePolicy.AS_INPUT,
        max_models=1,
    )

    def taken_as_it_is(self, context: TensorContext) -> int | None:
        """Without a scale the model's tensor is the result."""
        return 0 if context.per_model[0]["scale"] is None else None

    def coefficients(self, context: TensorContext, answers: Answers) -> PassthroughCoefficients:
        """Take the scale as it is."""
        scale = context.per_model[0]["scale"]
        return PassthroughCoefficients(None if scale is None else float(scale))

    def reference(self, block: Block, coefficients: PassthroughCoefficients, precision: Precision) -> Array:
        """Return ``x`` or ``x * scale``, rounded once."""
        values = block.inputs[0]
        if coefficients.scale is None:
            return values
        return precision.round(values * precision.carrier(coefficients.scale))

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Linear: the scale."""
        analysis = Analysis(context.models, context.base, context.compute)
        scale = self.coefficients(context, answers).scale
        result = analysis.input(0)
        if scale is not None:
            result = result * analysis.number(scale)
        return Response.linear(analysis, result)
