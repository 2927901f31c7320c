"""Interpolation of any number of models on a hypersphere, around their weighted mean (Goddard, "Multi-SLERP").

In exact arithmetic the step in the tangent space is zero, since the tangents of the weighted mean cancel. With the
roundings of a compute dtype they do not, so every step is taken. Each needs sums over the whole tensor that depend on
those before: norms, the norm of the mean, projections on it, the norm of the tangent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32
from mergefs.errors import RecipeError
from mergefs.kernels.elementary import cosine, sine
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.kernels.sums import row_sums
from mergefs.methods.contract import (
    NO_ANSWERS,
    Answers,
    BasePolicy,
    Block,
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
from mergefs.methods.rounding import Analysis, Form
from mergefs.methods.sums import MOMENTS, NORMS, SUMS, Sums, ask_sums


@dataclass(frozen=True, slots=True)
class MultislerpCoefficients:
    """The numbers of a merge, values of the compute dtype, as far as they are known.

    ``weights``, ``lengths`` (what inputs are divided by) and ``projections`` (of the directions on the mean's) belong
    to ``models``. ``mean_norm`` is None where the mean of the directions vanishes: then the weighted sum is taken.
    ``ahead`` and ``aside`` are the factors of the mean and of the tangent, ``radius`` that of the result.
    """

    base: int | None
    models: tuple[int, ...]
    weights: tuple[float, ...]
    lengths: tuple[float, ...] = ()
    mean_norm: float | None = None
    projections: tuple[float, ...] = ()
    ahead: float = 1.0
    aside: float = 1.0
    radius: float = 1.0


class Multislerp(Method[MultislerpCoefficients]):
    """``r * (cos(n) * m + sin(n) / n * v)``: m the mean direction, v the mean tangent, n its norm, r the mean norm."""

    specification = Specification(
        name="multislerp",
        title="Multi-SLERP",
        reference="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        summary="Interpolates any number of models, or what they add to a base, on a hypersphere.",
        parameters=(
            Parameter("weight", "float", Scope.PER_EXPERT, "weight of the model in the mean", required=True),
            Parameter("normalize_weights", "bool", Scope.GLOBAL, "divide the weights by their sum", default=True),
            Parameter(
                "eps",
                "float",
                Scope.GLOBAL,
                "added to norms before anything is divided by them; a mean with a smaller norm counts as vanished",
                default=1e-8,
                minimum=0.0,
            ),
        ),
        base=BasePolicy.OPTIONAL,
        min_experts=1,
        needs="the norms of the tensors, of their mean, and of what is left beside it, in four passes",
    )

    def check(self, context: TensorContext) -> None:
        """Refuse weights that sum to zero where the sum is a divisor, and weights that leave nothing to interpolate."""
        weights = _given_weights(context)
        if (
            len(weights) > 1
            and context.shared["normalize_weights"]
            and _added(weights, Precision(context.compute)) == 0
        ):
            raise RecipeError(
                f"the weights for tensor {context.name!r} sum to 0 and `normalize_weights` divides by that sum; "
                "change a `weight`, or set `normalize_weights: false`"
            )
        if len(weights) > 2 and not any(weights):
            raise RecipeError(f"every weight for tensor {context.name!r} is 0; change a `weight`")

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """The squared norms; nothing for a lone model, which is the result."""
        return _advance(context, NO_ANSWERS)[1]

    def further_statistics(self, context: TensorContext, answers: Answers) -> tuple[Statistic, ...]:
        """What the next step needs."""
        return _advance(context, answers)[1]

    def coefficients(self, context: TensorContext, answers: Answers) -> MultislerpCoefficients:
        """Take every step as far as single numbers go, by the steps of rounding that torch takes."""
        return _advance(context, answers)[0]

    def reference(self, block: Block, coefficients: MultislerpCoefficients, precision: Precision) -> Array:
        """Follow the formula, rounding after each step as torch does in the compute dtype."""
        kind = precision.carrier
        inputs = [block.inputs[model] for model in coefficients.models]
        if len(inputs) == 1:
            return inputs[0]
        base = None if coefficients.base is None else block.inputs[coefficients.base]
        deltas = inputs if base is None else [precision.round(values - base) for values in inputs]
        if coefficients.mean_norm is None:
            merged = _weighed(deltas, coefficients, precision)
        else:
            mean, directions = _mean_direction(deltas, coefficients, precision)
            ahead = precision.round(mean * kind(coefficients.ahead))
            aside = precision.round(_tangent(mean, directions, coefficients, precision) * kind(coefficients.aside))
            merged = precision.round(precision.round(ahead + aside) * kind(coefficients.radius))
        return merged if base is None else precision.round(merged + base)

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes for a merge, and those that statistics are added up by."""
        return ("multislerp", *MOMENTS, *NORMS, *SUMS)

    def fused(self, run: RawRun, coefficients: MultislerpCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES or len(coefficients.models) == 1:
            return None
        import mergefs.kernels.fused.multislerp as kernel
        from mergefs.kernels.fused.memory import address, addresses, empty_result

        inputs = [run.inputs[model] for model in coefficients.models]
        result = empty_result(inputs[0], run.dtype, run.into)
        base = inputs[0] if coefficients.base is None else run.inputs[coefficients.base]
        line = coefficients.mean_norm is None
        models = _numbers_of_models(coefficients)
        numbers = (coefficients.mean_norm or 0, coefficients.ahead, coefficients.aside, coefficients.radius)
        kernel.KERNEL.compiled(run.dtype)(
            result,
            addresses(inputs),
            address(base),
            coefficients.base is not None,
            models,
            line,
            np.array(numbers, dtype=np.float32),
            np.empty((len(inputs) + 2, kernel.TILE), dtype=np.float32),
        )
        return result.view(np.uint8)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Linear, with the numbers of all four passes: the tangents, too, are sums of the deltas."""
        known = self.coefficients(context, answers)
        analysis = Analysis(context.models, context.base, context.compute)
        if len(known.models) == 1:
            return Response.linear(analysis, analysis.input(known.models[0]))
        deltas = [analysis.input(m) if context.base is None else analysis.delta(m) for m in known.models]
        if known.mean_norm is None:
            merged = _response_of_weighed(analysis, deltas, known)
        else:
            directions = [analysis.rounded(d / length) for d, length in zip(deltas, known.lengths, strict=True)]
            mean = analysis.rounded(_response_of_weighed(analysis, directions, known) / known.mean_norm)
            tangents = [
                analysis.rounded(direction - analysis.rounded(mean * projection))
                for direction, projection in zip(directions, known.projections, strict=True)
            ]
            aside = analysis.rounded(_response_of_weighed(analysis, tangents, known) * known.aside)
            merged = analysis.rounded(analysis.rounded(mean * known.ahead) + aside)
            merged = analysis.rounded(merged * known.radius)
        return Response.linear(analysis, merged if context.base is None else merged + analysis.base())


def _response_of_weighed(analysis: Analysis, terms: Sequence[Form], known: MultislerpCoefficients) -> Form:
    """Return the weighted sum of ``terms``, with the roundings of ``_weighed``."""
    total = analysis.zero()
    for term, weight in zip(terms, known.weights, strict=True):
        total = analysis.carried(total + analysis.rounded(term * weight))
    return analysis.rounded(total)


def _given_weights(context: TensorContext) -> list[float]:
    """Return the weights of the recipe, rounded to the compute dtype."""
    precision = Precision(context.compute)
    return [float(precision.scalar(context.number("weight", model))) for model in context.experts]


def _added(numbers: Sequence[float], precision: Precision) -> float:
    """Return the sum of values of the compute dtype, accumulated as torch does and rounded once."""
    if precision.dtype == F32:
        return float(row_sums(np.array([numbers], dtype=np.float32))[0])
    total = precision.carrier(0)
    for number in numbers:
        total = total + precision.carrier(number)
    return float(precision.scalar(float(total)))


def _weights(context: TensorContext) -> tuple[float, ...]:
    """Return the weights as they enter the merge."""
    precision = Precision(context.compute)
    weights = _given_weights(context)
    if not context.shared["normalize_weights"] or len(weights) == 1:
        return tuple(weights)
    total = precision.carrier(_added(weights, precision))
    return tuple(float(precision.scalar(float(precision.carrier(weight) / total))) for weight in weights)


def _advance(context: TensorContext, answers: Answers) -> tuple[MultislerpCoefficients, tuple[Statistic, ...]]:
    """Return the numbers that follow from ``answers``, and what must be asked for the next ones: nothing at the end."""
    known = MultislerpCoefficients(context.base, context.experts, _weights(context))
    if len(known.models) == 1:
        return known, ()
    precision = Precision(context.compute)
    least = precision.scalar(context.number("eps"))

    wanted = _norms(context, "deltas", known, _deltas, len(known.models))
    if wanted not in answers:
        return known, (wanted,)
    norms = [float(precision.scalar(norm)) for norm in known_norms(answers, wanted)]
    # In F16 eps is 0: there what has no length has no direction either, where torch would divide by zero.
    lengths = [float(precision.scalar(norm + float(least))) or 1.0 for norm in norms]
    weighed = [precision.carrier(norm) * precision.carrier(w) for norm, w in zip(norms, known.weights, strict=True)]
    radius = _added([float(precision.scalar(float(one))) for one in weighed], precision)
    known = replace(known, lengths=tuple(lengths), radius=radius)

    mean = _norms(context, "mean", known, _mean, 1)
    if mean not in answers:
        return known, (mean,)
    mean_norm = float(precision.scalar(known_norms(answers, mean)[0]))
    if mean_norm < least or mean_norm == 0:
        return known, ()
    known = replace(known, mean_norm=mean_norm)

    products = _projections_on_mean(context, known)
    if products not in answers:
        return known, (products,)
    known = replace(known, projections=tuple(float(precision.scalar(one)) for one in answers.vector(products)))

    tangent = _norms(context, "tangent", known, _mean_tangent, 1)
    if tangent not in answers:
        return known, (tangent,)
    angle = precision.scalar(float(precision.scalar(known_norms(answers, tangent)[0])) + float(least))
    ahead, across = (float(function(np.array([angle]), precision)[0]) for function in (cosine, sine))
    aside = 1.0 if angle == 0 else float(precision.scalar(float(precision.carrier(across) / angle)))
    return replace(known, ahead=ahead, aside=aside), ()


def _weighed(terms: Sequence[Array], known: MultislerpCoefficients, precision: Precision) -> Array:
    """Return the weighted sum of ``terms``: products rounded, accumulated in order, and rounded once."""
    total: Array = np.zeros_like(terms[0])
    for values, weight in zip(terms, known.weights, strict=True):
        total = total + precision.round(values * precision.carrier(weight))
    return precision.round(total)


def _mean_direction(
    deltas: Sequence[Array], known: MultislerpCoefficients, precision: Precision
) -> tuple[Array, list[Array]]:
    """Return the weighted mean of the directions, of length 1 once its norm is known, and the directions."""
    kind = precision.carrier
    directions = [precision.round(delta / kind(length)) for delta, length in zip(deltas, known.lengths, strict=True)]
    mean = _weighed(directions, known, precision)
    return (mean if known.mean_norm is None else precision.round(mean / kind(known.mean_norm))), directions


def _tangent(mean: Array, directions: Sequence[Array], known: MultislerpCoefficients, precision: Precision) -> Array:
    """Return the weighted sum of what is left of the directions beside the mean."""
    tangents = [
        precision.round(direction - precision.round(precision.carrier(projection) * mean))
        for direction, projection in zip(directions, known.projections, strict=True)
    ]
    return _weighed(tangents, known, precision)


# What is summed over the whole tensor

_Terms: TypeAlias = Callable[[Sequence[Array], MultislerpCoefficients, Precision], Sequence[Array]]


def _norms(context: TensorContext, name: str, known: MultislerpCoefficients, terms: _Terms, count: int) -> Norms:
    """Ask for the norms of ``terms``."""
    models, of_block, arguments = _about(context, known, terms)
    moments = Moments(known.base is not None) if terms is _deltas else None
    fused = None if terms is _deltas else partial(_terms_fused, known=known, of_mean=terms is _mean)
    about = f"multislerp: {name}"
    return ask_norms(context.compute, about, models, of_block, arguments, fused=fused, moments=moments, count=count)


def _projections_on_mean(context: TensorContext, known: MultislerpCoefficients) -> Sums:
    """Ask for the inner products of the directions with the mean's."""
    models, of_block, arguments = _about(context, known, _projections)
    fused = partial(_projections_fused, known=known)
    name, count = "multislerp: projections", len(known.models)
    return ask_sums(context.compute, name, models, of_block, arguments, fused=fused, count=count)


def _terms_fused(block: Block, precision: Precision, known: MultislerpCoefficients, of_mean: bool) -> Array:
    """Return a row of the mean, or of the mean tangent, in one pass."""
    import mergefs.kernels.fused.multislerp as kernel

    return _computed(block, precision, known, kernel.MEAN if of_mean else kernel.TANGENT)


def _projections_fused(block: Block, precision: Precision, known: MultislerpCoefficients) -> Array:
    """Return a row for each direction, in one pass."""
    import mergefs.kernels.fused.multislerp as kernel

    return _computed(block, precision, known, kernel.PROJECTIONS)


def _computed(block: Block, precision: Precision, known: MultislerpCoefficients, wanted: int) -> Array:
    """Return what is ``wanted`` of ``mergefs.kernels.fused.multislerp``."""
    from mergefs.kernels.fused.multislerp import terms

    raws = [np.ascontiguousarray(values, dtype=np.float32).view(np.uint8) for values in block.inputs]
    inputs, base = raws[: len(known.models)], None if known.base is None else raws[-1]
    return terms(precision.dtype, inputs, base, _numbers_of_models(known), wanted, known.mean_norm or 0)


def _numbers_of_models(known: MultislerpCoefficients) -> NDArray[np.float32]:
    """Return weight, length and projection of each model, as far as they are known, in the form that kernels take."""
    numbers = np.zeros((len(known.models), 3), dtype=np.float32)
    for column, values in enumerate((known.weights, known.lengths, known.projections)):
        if values:
            numbers[:, column] = values
    return numbers


def _about(
    context: TensorContext, known: MultislerpCoefficients, terms: _Terms
) -> tuple[tuple[int, ...], Callable[[Block, Precision], Array], tuple[float, ...]]:
    """Return models, terms and arguments of a question about deltas.

    What is known follows from the inputs, the weights and eps.
    """

    def of_block(block: Block, precision: Precision) -> Array:
        inputs = block.inputs[: len(known.models)]
        if known.base is not None:
            inputs = tuple(precision.round(values - block.inputs[-1]) for values in inputs)
        return np.stack(terms(inputs, known, precision))

    models = known.models if known.base is None else (*known.models, known.base)
    return models, of_block, (*known.weights, context.number("eps"), float(known.base is not None))


def _deltas(deltas: Sequence[Array], known: MultislerpCoefficients, precision: Precision) -> Sequence[Array]:
    return deltas


def _mean(deltas: Sequence[Array], known: MultislerpCoefficients, precision: Precision) -> Sequence[Array]:
    return [_mean_direction(deltas, known, precision)[0]]


def _projections(deltas: Sequence[Array], known: MultislerpCoefficients, precision: Precision) -> Sequence[Array]:
    mean, directions = _mean_direction(deltas, known, precision)
    return [precision.round(direction * mean) for direction in directions]


def _mean_tangent(deltas: Sequence[Array], known: MultislerpCoefficients, precision: Precision) -> Sequence[Array]:
    mean, directions = _mean_direction(deltas, known, precision)
    return [_tangent(mean, directions, known, precision)]
