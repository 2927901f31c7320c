"""The Karcher mean (Riemannian centre of mass) of models on a hypersphere, by its fixed point iteration.

Each step of the iteration needs sums over the whole tensor that depend on the step before: the inner products of the
mean with each direction, the norm of the tangent, and that of the new mean. What was found is kept, and the elements
are computed anew from the inputs, since no statistic may keep a whole tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from mergefs.checkpoint.dtypes import F32, F64
from mergefs.errors import RecipeError
from mergefs.kernels.elementary import arc_cosine, cosine, sine
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.methods.contract import (
    NO_ANSWERS,
    Answers,
    BasePolicy,
    Block,
    ElementSums,
    Method,
    Moments,
    Parameter,
    RawRun,
    Response,
    Scope,
    Specification,
    Statistic,
    TensorContext,
    Vector,
)
from mergefs.methods.norms import Norms, ask_norms, known_norms
from mergefs.methods.rounding import Analysis, Form
from mergefs.methods.sums import MOMENTS, NORMS, SUMS

if TYPE_CHECKING:
    import mergefs.kernels.fused.karcher as kernel

_MOST_STEPS: Final = 100
"""What a step costs grows with the steps before it."""


@dataclass(frozen=True, slots=True)
class Pull:
    """How one direction pulls the mean: ``strength`` times what is left of it beside its ``projection`` on the mean.

    Values of the compute dtype.
    """

    direction: int
    projection: float
    strength: float


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the iteration, as far as it is known.

    The new mean is ``ahead`` times the old one plus ``aside`` times the tangent of length 1, divided by ``mean_norm``
    (None: it is not). Norms are float32 (float64 for F64), factors values of the compute dtype.
    """

    pulls: tuple[Pull, ...]
    tangent_norm: float | None = None
    ahead: float = 1.0
    aside: float = 0.0
    mean_norm: float | None = None


@dataclass(frozen=True, slots=True)
class KarcherCoefficients:
    """The numbers of a merge, as far as they are known.

    ``norms`` are those of the inputs ``models`` that have a direction, and ``share`` is the weight of each of these.
    The mean begins as their weighted sum, divided by ``mean_norm``, or where that vanishes as the first of them. At the
    end it is multiplied by ``radius``.
    """

    models: tuple[int, ...]
    norms: tuple[float, ...] = ()
    share: float = 1.0
    starts_with_first: bool = False
    mean_norm: float | None = None
    steps: tuple[Step, ...] = ()
    radius: float = 0.0


class Karcher(Method[KarcherCoefficients]):
    """The point of the sphere whose mean squared angle to all models is least, times their mean norm."""

    specification = Specification(
        name="karcher",
        title="Karcher Mean",
        reference="https://arxiv.org/abs/2603.04972",
        summary="The centre of any number of models on a hypersphere, all with the same weight.",
        parameters=(
            Parameter(
                "max_iter", "int", Scope.GLOBAL, "largest number of steps towards the centre", default=10, minimum=0
            ),
            Parameter(
                "tol",
                "float",
                Scope.GLOBAL,
                "a smaller step ends the iteration; smaller angles and norms count as none",
                default=1e-5,
                minimum=0.0,
            ),
        ),
        base=BasePolicy.AS_INPUT,
        needs="the norms of the tensors, then up to three sums for each step towards the centre",
    )

    def check(self, context: TensorContext) -> None:
        """Refuse more steps than anybody waits for: each needs sums over the whole tensor, along all steps before."""
        if context.number("max_iter") > _MOST_STEPS:
            raise RecipeError(
                f"tensor {context.name!r}: karcher walks at most {_MOST_STEPS} steps, and `max_iter` is "
                f"{context.number('max_iter'):g}; set it to {_MOST_STEPS} or less, since the walk ends where a step is "
                "shorter than `tol`"
            )

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """The squared norms; nothing for a lone model, which is the result."""
        return _advance(context, NO_ANSWERS)[1]

    def further_statistics(self, context: TensorContext, answers: Answers) -> tuple[Statistic, ...]:
        """What the next part of a step needs: at most three passes for each step, beside two before the first."""
        return _advance(context, answers)[1]

    def coefficients(self, context: TensorContext, answers: Answers) -> KarcherCoefficients:
        """Take every step as far as single numbers go, by the steps of rounding that torch takes."""
        return _advance(context, answers)[0]

    def reference(self, block: Block, coefficients: KarcherCoefficients, precision: Precision) -> Array:
        """Follow the formula, rounding after each step as torch does in the compute dtype."""
        kind = precision.carrier
        if len(block.inputs) == 1:
            return block.inputs[0]
        if not coefficients.models:
            # Nothing has a direction; as torch computes it, a NaN stays one.
            nothing: Array = np.zeros_like(block.inputs[0])
            for values in block.inputs:
                nothing = nothing + values * kind(0)
            return nothing
        reached = _walk([block.inputs[model] for model in coefficients.models], coefficients, precision)
        return precision.round(kind(precision.scalar(coefficients.radius)) * reached.mean)

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes, for statistics too."""
        return ("karcher", *MOMENTS, *NORMS, *SUMS)

    def fused(self, run: RawRun, coefficients: KarcherCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES or len(run.inputs) == 1 or not coefficients.models:
            return None
        import mergefs.kernels.fused.karcher as kernel

        with np.errstate(all="ignore"):
            radius = float(Precision(run.dtype).scalar(coefficients.radius))
        inputs = [run.inputs[model] for model in coefficients.models]
        return kernel.merge(run.dtype, inputs, _path(coefficients), radius)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Linear, with the numbers of the whole walk: each step adds up what has been a sum of the inputs."""
        known = self.coefficients(context, answers)
        analysis = Analysis(context.models, context.base, context.compute)
        if context.models == 1:
            return Response.linear(analysis, analysis.input(0))
        if not known.models:
            return Response.linear(analysis, analysis.zero())
        radius = float(Precision(context.compute).scalar(known.radius))
        return Response.linear(analysis, _response_of_walk(analysis, known) * radius)


def _advance(context: TensorContext, answers: Answers) -> tuple[KarcherCoefficients, tuple[Statistic, ...]]:
    """Return the numbers that follow from ``answers``, and what must be asked for the next ones: nothing at the end."""
    known = KarcherCoefficients(())
    if context.models == 1:
        return known, ()
    norms = _norms(context, "inputs", tuple(range(context.models)), known, _inputs, context.models)
    if norms not in answers:
        return known, (norms,)
    known = _start(context, known_norms(answers, norms))
    if not known.models:
        return known, ()

    mean = _norms(context, "first mean", known.models, known, _mean, 1)
    if mean not in answers:
        return known, (mean,)
    mean_norm = _single_norm(context, known_norms(answers, mean)[0])
    if mean_norm < context.number("tol") or mean_norm == 0:
        known = replace(known, starts_with_first=True)
    else:
        known = replace(known, mean_norm=mean_norm)
    for number in range(int(context.number("max_iter"))):
        step, missing = _step(context, answers, known, number)
        if missing:
            return known, missing
        if step is None:
            break
        known = replace(known, steps=(*known.steps, step))
    return known, ()


def _start(context: TensorContext, lengths: Sequence[float]) -> KarcherCoefficients:
    """Return what follows from the norms of all inputs."""
    single = _single(context).carrier
    norms = [_single_norm(context, length) for length in lengths]
    # NaN is not larger than anything, so an input with one has no direction; it still makes the radius NaN.
    valid = tuple(model for model, norm in enumerate(norms) if norm > context.number("tol"))
    share = 1.0 / context.models
    radius = single(0)
    for norm in norms:
        radius = radius + single(share) * single(norm)
    return KarcherCoefficients(
        models=valid,
        norms=tuple(norms[model] for model in valid),
        share=share / sum([share] * len(valid)) if valid else 1.0,
        radius=float(radius),
    )


def _step(
    context: TensorContext, answers: Answers, known: KarcherCoefficients, number: int
) -> tuple[Step | None, tuple[Statistic, ...]]:
    """Return one more step, or None where the iteration has ended; or what must be asked to know."""
    precision = Precision(context.compute)
    tolerance = context.number("tol")

    products = _products(context, f"projections {number}", known)
    if products not in answers:
        return None, (products,)
    pulls = _pulls(answers.vector(products), known, tolerance, precision)
    if not pulls:
        return None, ()
    step = Step(pulls)

    unfinished = replace(known, steps=(*known.steps, step))
    tangent = _norms(context, f"tangent {number}", known.models, unfinished, _tangent, 1)
    if tangent not in answers:
        return None, (tangent,)
    length = _single_norm(context, known_norms(answers, tangent)[0])
    if length < tolerance or length == 0:
        return None, ()
    # torch rounds a number that stands before the tensor, and one that the tensor is divided by not.
    single = _single(context)
    ahead, aside = (
        float(precision.scalar(float(function(np.array([length]), single)[0]))) for function in (cosine, sine)
    )
    step = replace(step, tangent_norm=length, ahead=ahead, aside=aside)

    unfinished = replace(known, steps=(*known.steps, step))
    mean = _norms(context, f"mean {number}", known.models, unfinished, _mean, 1)
    if mean not in answers:
        return None, (mean,)
    mean_norm = _single_norm(context, known_norms(answers, mean)[0])
    return replace(step, mean_norm=mean_norm if mean_norm > tolerance else None), ()


def _pulls(products: Vector, known: KarcherCoefficients, tolerance: float, precision: Precision) -> tuple[Pull, ...]:
    """Return the pulls of all directions that are not the mean's, from their inner products with it."""
    kind = precision.carrier
    projections = np.clip(precision.round(products.astype(kind)), -1, 1)
    angles = arc_cosine(projections, precision)
    with np.errstate(all="ignore"):
        strengths = precision.round(kind(known.share) * precision.round(angles / sine(angles, precision)))
    return tuple(
        Pull(index, float(projection), float(strength))
        for index, (projection, angle, strength) in enumerate(zip(projections, angles, strengths, strict=True))
        if not (float(angle) < tolerance or angle == 0)
    )


def _single(context: TensorContext) -> Precision:
    """Return the precision of norms, and of what follows from them: F32, or F64 where the merge computes in that."""
    return Precision(F64 if context.compute == F64 else F32)


def _single_norm(context: TensorContext, norm: float) -> float:
    """Return a norm as the float32 that it is (float64 for F64)."""
    return float(_single(context).scalar(norm))


@dataclass(frozen=True, slots=True)
class _Reached:
    """Where the iteration stands in a run of elements; ``tangent`` is that of its last step."""

    mean: Array
    tangent: Array


def _walk(inputs: Sequence[Array], known: KarcherCoefficients, precision: Precision) -> _Reached:
    """Take all steps that are known; of one whose tangent has no norm yet, only the tangent."""
    kind = precision.carrier
    directions = _directions(inputs, known, precision)
    if known.starts_with_first:
        mean = directions[0]
    else:
        mean = np.zeros_like(directions[0])
        for direction in directions:
            mean = precision.round(mean + precision.round(direction * kind(known.share)))
        if known.mean_norm is not None:
            mean = precision.round(mean / kind(known.mean_norm))
    tangent: Array = np.zeros_like(mean)
    for step in known.steps:
        tangent = np.zeros_like(mean)
        for pull in step.pulls:
            beside = precision.round(directions[pull.direction] - precision.round(kind(pull.projection) * mean))
            tangent = precision.round(tangent + precision.round(kind(pull.strength) * beside))
        if step.tangent_norm is None:
            break
        ahead = precision.round(kind(step.ahead) * mean)
        aside = precision.round(kind(step.aside) * precision.round(tangent / kind(step.tangent_norm)))
        mean = precision.round(ahead + aside)
        if step.mean_norm is not None:
            mean = precision.round(mean / kind(step.mean_norm))
    return _Reached(mean, tangent)


def _response_of_walk(analysis: Analysis, known: KarcherCoefficients) -> Form:
    """Return the mean that ``_walk`` reaches, with its roundings."""
    directions = [
        analysis.rounded(analysis.input(model) / norm) for model, norm in zip(known.models, known.norms, strict=True)
    ]
    mean, share = analysis.zero(), analysis.number(known.share)
    if known.starts_with_first:
        mean = directions[0]
    else:
        for direction in directions:
            mean = analysis.rounded(mean + analysis.rounded(direction * share))
        if known.mean_norm is not None:
            mean = analysis.rounded(mean / known.mean_norm)
    for step in known.steps:
        tangent = analysis.zero()
        for pull in step.pulls:
            beside = directions[pull.direction] - analysis.rounded(mean * pull.projection)
            tangent = analysis.rounded(tangent + analysis.rounded(analysis.rounded(beside) * pull.strength))
        if step.tangent_norm is None:
            break
        aside = analysis.rounded(analysis.rounded(tangent / step.tangent_norm) * step.aside)
        mean = analysis.rounded(analysis.rounded(mean * step.ahead) + aside)
        if step.mean_norm is not None:
            mean = analysis.rounded(mean / step.mean_norm)
    return mean


def _directions(inputs: Sequence[Array], known: KarcherCoefficients, precision: Precision) -> list[Array]:
    return [precision.round(x / precision.carrier(norm)) for x, norm in zip(inputs, known.norms, strict=True)]


def _walk_fused(inputs: Sequence[Array], known: KarcherCoefficients, precision: Precision) -> _Reached:
    """Do the same by the compiled kernel, in any of the dtypes that have some."""
    import mergefs.kernels.fused.karcher as kernel

    return _Reached(*kernel.reached(precision.dtype, _raws(inputs), _path(known)))


def _raws(inputs: Sequence[Array]) -> list[Raw]:
    """Return arrays of float32 as bytes."""
    return [np.ascontiguousarray(values, dtype=np.float32).view(np.uint8) for values in inputs]


def _path(known: KarcherCoefficients) -> "kernel.Path":
    """Return what is known in the form that the kernel takes."""
    import mergefs.kernels.fused.karcher as kernel

    steps = np.zeros((len(known.steps), kernel.NUMBERS), dtype=np.float32)
    pulls = np.zeros((len(known.steps), len(known.models), 2), dtype=np.float32)
    for number, step in enumerate(known.steps):
        steps[number] = (step.tangent_norm or 0, step.ahead, step.aside, step.mean_norm or 0)
        for pull in step.pulls:
            pulls[number, pull.direction] = (pull.projection, pull.strength)
    share = 0.0 if known.starts_with_first else known.share
    start = np.array([share, known.mean_norm or 0], dtype=np.float32)
    return kernel.Path(np.array(known.norms, dtype=np.float32), start, steps, pulls)


# What is summed over the whole tensor

_Walk: TypeAlias = Callable[[Sequence[Array], KarcherCoefficients, Precision], _Reached]
_Terms: TypeAlias = Callable[[Sequence[Array], KarcherCoefficients, Precision, _Walk], Sequence[Array]]


def _norms(
    context: TensorContext, name: str, models: tuple[int, ...], known: KarcherCoefficients, terms: _Terms, count: int
) -> Norms:
    """Ask for the norms of ``terms``, of which torch makes float32 first."""
    return ask_norms(
        context.compute,
        f"karcher: {name}",
        models,
        _of_block(known, terms, _walk),
        _arguments(context),
        fused=_of_block(known, terms, _walk_fused),
        moments=Moments() if terms is _inputs else None,
        count=count,
        widened=True,
    )


def _products(context: TensorContext, name: str, known: KarcherCoefficients) -> ElementSums:
    """Ask for the inner products of the mean with each direction."""
    return ElementSums(
        f"karcher: {name}",
        known.models,
        _of_block(known, _projections, _walk),
        _arguments(context),
        fused=partial(_projections_fused, known=known),
        count=len(known.models),
    )


def _projections_fused(block: Block, precision: Precision, known: KarcherCoefficients) -> Array:
    """Return the products of the mean with each direction in one pass."""
    import mergefs.kernels.fused.karcher as kernel

    return kernel.projections(precision.dtype, _raws(block.inputs), _path(known))


def _of_block(known: KarcherCoefficients, terms: _Terms, walk: _Walk) -> Callable[[Block, Precision], Array]:
    return lambda block, precision: np.stack(terms(block.inputs, known, precision, walk))


def _arguments(context: TensorContext) -> tuple[float, ...]:
    """Return what all that is known follows from, beside the inputs."""
    return (context.number("tol"), float(context.models))


def _inputs(inputs: Sequence[Array], known: KarcherCoefficients, precision: Precision, walk: _Walk) -> Sequence[Array]:
    return inputs


def _mean(inputs: Sequence[Array], known: KarcherCoefficients, precision: Precision, walk: _Walk) -> Sequence[Array]:
    return [walk(inputs, known, precision).mean]


def _tangent(inputs: Sequence[Array], known: KarcherCoefficients, precision: Precision, walk: _Walk) -> Sequence[Array]:
    return [walk(inputs, known, precision).tangent]


def _projections(
    inputs: Sequence[Array], known: KarcherCoefficients, precision: Precision, walk: _Walk
) -> Sequence[Array]:
    mean = walk(inputs, known, precision).mean.astype(np.float64)
    return [mean * direction for direction in _directions(inputs, known, precision)]
