"""The task-vector family: what experts add to a base, sparsified, weighed, reconciled and added back.

task_arithmetic: Ilharco et al. 2023, arXiv 2212.04089. ties: Yadav et al. 2023, arXiv 2306.01708. dare: Yu et al.
2024, arXiv 2311.03099. breadcrumbs: Davari and Belilovsky 2023, arXiv 2312.06795. della: Deep et al. 2024,
arXiv 2406.11617. One skeleton serves them all; they differ in which elements of a delta survive, whether a majority
sign is elected, and in defaults.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np

from mergefs.checkpoint.dtypes import BF16
from mergefs.errors import RecipeError
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.kernels.random import bernoulli_limit, stream_key
from mergefs.kernels.sums import LANES
from mergefs.methods.contract import (
    LONGEST_ROW,
    Answers,
    BasePolicy,
    Block,
    ElementSums,
    MagnitudeRescale,
    MagnitudeThreshold,
    Method,
    Parameter,
    RawRun,
    Response,
    Scope,
    Specification,
    Statistic,
    TensorContext,
    Vector,
)
from mergefs.methods.fused_masks import fused_mask, survivors_by_rank
from mergefs.methods.masks import (
    KeepAll,
    KeepLargest,
    KeepNone,
    KeepRandom,
    KeepRanked,
    Mask,
    drawing,
    kept,
)
from mergefs.methods.task_vector_response import task_vector_response

Sparsifier = Literal["none", "magnitude", "outliers", "random", "ranked"]

_SMALLEST_SUM: Final = 1e-7
_SMALLEST_WEIGHT: Final = 1e-8


@dataclass(frozen=True, slots=True)
class _Band:
    """Of the magnitudes in falling order, the first ``keep`` survive without the first ``beyond``."""

    keep: int
    beyond: int


@dataclass(frozen=True, slots=True)
class ExpertCoefficients:
    """How one expert's delta enters: which elements, times ``rescale`` (None: as they are), times ``weight``."""

    model: int
    mask: Mask
    rescale: float | None
    weight: float


@dataclass(frozen=True, slots=True)
class TaskVectorCoefficients:
    """Everything that the kernel of the family needs.

    All numbers are values of the compute dtype but ``scale`` and, in F16, the ``rescale`` of a random mask, which is a
    float32. ``divisor`` is the fixed divisor of the sum (None: elected for each element, or none at all); ``scale`` is
    the recipe's lambda (None where it is 1).
    """

    base: int
    experts: tuple[ExpertCoefficients, ...]
    consensus: bool
    normalize: bool
    divisor: float | None
    scale: float | None


@dataclass(frozen=True, slots=True)
class TaskVector(Method[TaskVectorCoefficients]):
    """One member of the family."""

    specification: Specification
    sparsifier: Sparsifier
    consensus: bool

    def check(self, context: TensorContext) -> None:
        """Refuse probabilities outside of (0, 1), and rows that are too long to be ranked."""
        for model in context.experts if self.sparsifier == "ranked" else ():
            density, epsilon = context.number("density", model), context.number("epsilon", model)
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise RecipeError(
                    f"tensor {context.name!r}: density {density} -+ epsilon {epsilon} must stay between 0 and 1; "
                    "choose a smaller `epsilon`, or another `density`"
                )
            if context.row > LONGEST_ROW:
                raise RecipeError(
                    f"tensor {context.name!r} has rows of {context.row} elements, and {self.specification.name} ranks "
                    f"rows of at most {LONGEST_ROW}; choose a method that does not work by rows"
                )

    def remarks(self, context: TensorContext) -> tuple[str, ...]:
        """Tell weights that sum to zero, where the sum would be the divisor."""
        if not context.shared["normalize"] or self.consensus or not context.experts:
            return ()
        vanishes = abs(sum(context.number("weight", model) for model in context.experts)) < _SMALLEST_WEIGHT
        return ("the weights sum to 0, so `normalize` divides by nothing",) if vanishes else ()

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """The threshold of each expert that a density prunes by magnitude, and its rescaling if wanted."""
        wanted: list[Statistic] = []
        for model in context.experts:
            ranked = self._ranked(context, model)
            if ranked is not None and context.shared["rescale"]:
                wanted.append(_rescale_sums(context, model, ranked))
            band = self._band(context, model)
            if band is None:
                continue
            wanted += [MagnitudeThreshold(model, keep) for keep in (band.keep, band.beyond) if keep]
            if context.shared["rescale"]:
                wanted.append(MagnitudeRescale(model, band.keep, band.beyond))
        return tuple(wanted)

    def _band(self, context: TensorContext, model: int) -> "_Band | None":
        """Return which magnitudes pruning by magnitude keeps, or None where it keeps all or none, or does not apply."""
        density, size = context.number("density", model), context.size
        if density >= 1 or density <= 0 or size == 0:
            return None
        if self.sparsifier == "magnitude":
            return _Band(max(1, int(density * size)), 0)
        if self.sparsifier == "outliers":
            kept = int(density * size)
            smallest = max(0, size - kept - int(context.number("gamma", model) * size))
            return _Band(size - smallest, size - smallest - kept) if kept else None
        return None

    def _ranked(self, context: TensorContext, model: int) -> KeepRanked | None:
        """Return the mask of a method that keeps by rank, or None where all or none is kept, or it does not apply."""
        density = context.number("density", model)
        if self.sparsifier != "ranked" or density >= 1 or density <= 0:
            return None
        key = stream_key(context.seed, model, context.name)
        return KeepRanked(key, context.row, density, context.number("epsilon", model))

    def coefficients(self, context: TensorContext, answers: Answers) -> TaskVectorCoefficients:
        """Round the numbers of the recipe to the compute dtype, as they enter the arithmetic."""
        if context.base is None:
            raise ValueError("the task-vector family needs a base")
        precision = Precision(context.compute)
        experts = tuple(self._expert(context, model, answers, precision) for model in context.experts)
        divisor: float | None = None
        if not self.consensus:
            total = precision.carrier(0)
            for expert in experts:
                total = total + precision.carrier(expert.weight)
            rounded = precision.scalar(float(total))
            divisor = 1.0 if abs(rounded) < _SMALLEST_WEIGHT else float(rounded)
        scale = context.number("lambda")
        return TaskVectorCoefficients(
            base=context.base,
            experts=experts,
            consensus=self.consensus,
            normalize=bool(context.shared["normalize"]),
            divisor=divisor,
            scale=None if scale == 1 else scale,
        )

    def _expert(self, context: TensorContext, model: int, answers: Answers, precision: Precision) -> ExpertCoefficients:
        """Return the coefficients of one expert."""
        weight = float(precision.scalar(context.number("weight", model)))
        density = context.number("density", model)
        rescale: float | None = None
        mask: Mask = KeepAll()
        band = self._band(context, model)
        ranked = self._ranked(context, model)
        if ranked is not None:
            mask = ranked
            if context.shared["rescale"]:
                rescale = _rescale_of_sums(context, answers, model, ranked)
        elif band is not None:
            outliers = answers.threshold(model, band.beyond) if band.beyond else None
            mask = KeepLargest(answers.threshold(model, band.keep), outliers)
            if context.shared["rescale"]:
                rescale = float(precision.scalar(answers.number(MagnitudeRescale(model, band.keep, band.beyond))))
        elif (density <= 0 and self.sparsifier != "none") or (density < 1 and self.sparsifier == "outliers"):
            mask = KeepNone()
        elif self.sparsifier == "random" and density < 1:
            # torch draws in bfloat16 as it is and in float32 for float16, and so does the factor enter.
            drawn = drawing(precision)
            probability = float(precision.scalar(density) if context.compute == BF16 else np.float32(density))
            mask = KeepRandom(stream_key(context.seed, model, context.name), bernoulli_limit(probability))
            if context.shared["rescale"]:
                rescale = float(drawn.scalar(1 / density))
        return ExpertCoefficients(model, mask, rescale, weight)

    def grain(self, coefficients: TaskVectorCoefficients) -> int:
        """Return a row where a mask ranks rows."""
        return max((e.mask.row for e in coefficients.experts if isinstance(e.mask, KeepRanked)), default=1)

    def reference(self, block: Block, coefficients: TaskVectorCoefficients, precision: Precision) -> Array:
        """Follow the formula, rounding after each step as torch does in the compute dtype."""
        base = block.inputs[coefficients.base]
        deltas = [_weighted_delta(block, expert, base, precision) for expert in coefficients.experts]
        if not deltas:
            return base
        weights = [precision.carrier(expert.weight) for expert in coefficients.experts]
        divisor: Array
        if coefficients.consensus:
            majority = np.where(precision.round(_sum(deltas)) >= 0, 1, -1).astype(base.dtype)
            agree = [(np.sign(delta) == majority).astype(base.dtype) for delta in deltas]
            mixed = precision.round(_sum([d * a for d, a in zip(deltas, agree, strict=True)]))
            divisor = precision.round(_sum([w * a for w, a in zip(weights, agree, strict=True)]))
            divisor = np.where(divisor == 0, base.dtype.type(1), divisor)
        else:
            mixed = precision.round(_sum(deltas))
            divisor = np.asarray(coefficients.divisor, dtype=base.dtype)
        if coefficients.normalize:
            mixed = precision.round(mixed / divisor)
        if coefficients.scale is not None:
            mixed = precision.round(mixed * base.dtype.type(coefficients.scale))
        return precision.round(base + mixed)

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes, and those that rank rows or find thresholds."""
        if self.sparsifier == "ranked":
            return ("task_vector", "ranking")
        counted = ("histogram", "location", "refinement") if self.sparsifier in ("magnitude", "outliers") else ()
        return ("task_vector", *counted)

    def fused(self, run: RawRun, coefficients: TaskVectorCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes."""
        if run.dtype not in FUSED_DTYPES or not coefficients.experts:
            return None
        import mergefs.kernels.fused.task_vector as kernel
        from mergefs.kernels.fused.memory import address, empty_result

        divisor, scale = coefficients.divisor, coefficients.scale
        base = run.inputs[coefficients.base]
        settings = kernel.Settings(
            base=address(base),
            start=run.start,
            consensus=coefficients.consensus,
            normalize=coefficients.normalize,
            divisor=1.0 if divisor is None else divisor,
            scaled=scale is not None,
            scale=1.0 if scale is None else scale,
        )
        marks = {
            expert.model: survivors_by_rank(expert.mask, run.inputs[expert.model], base, run.start, run.dtype)
            for expert in coefficients.experts
            if isinstance(expert.mask, KeepRanked)
        }
        experts = [
            kernel.Expert(
                address=address(run.inputs[expert.model]),
                weight=expert.weight,
                rescaled=expert.rescale is not None,
                rescale=1.0 if expert.rescale is None else expert.rescale,
                **fused_mask(expert.mask, run.dtype, marks.get(expert.model)),
            )
            for expert in coefficients.experts
        ]
        result = empty_result(base, run.dtype, run.into)
        kernel.merge(run.dtype, result, settings, experts)
        return result.view(np.uint8)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Linear, with the weights after normalisation and lambda; where signs are elected an estimate."""
        densities = [
            1.0 if self.sparsifier == "none" else min(1.0, max(0.0, context.number("density", model)))
            for model in context.experts
        ]
        return task_vector_response(context, self.coefficients(context, answers), densities)


def _weighted_delta(block: Block, expert: ExpertCoefficients, base: Array, precision: Precision) -> Array:
    """Return weight * rescale * mask * (x - base) of one expert."""
    delta = precision.round(block.inputs[expert.model] - base)
    if not isinstance(expert.mask, KeepAll):
        delta = delta * kept(expert.mask, delta, block.start, precision)
    if expert.rescale is not None:
        delta = precision.round(delta * delta.dtype.type(expert.rescale))
    return precision.round(delta * delta.dtype.type(expert.weight))


def _rescale_sums(context: TensorContext, model: int, mask: KeepRanked) -> ElementSums:
    """Ask for the sum of all magnitudes of a delta, and for that of those that a mask keeps."""
    if context.base is None:
        raise ValueError("a delta needs a base")
    models = (model, context.base)
    arguments = (float(mask.key), mask.density, mask.epsilon, float(mask.row))
    terms, lanes = partial(_magnitudes, mask=mask), partial(_lanes_of_magnitudes, mask=mask)
    return ElementSums("delta magnitudes, all and kept by rank", models, terms, arguments, lanes=lanes, count=2)


def _magnitudes(block: Block, precision: Precision, mask: KeepRanked) -> Array:
    """Return a row of all magnitudes of a delta, and one of those that a mask keeps, 0 for the others."""
    delta = precision.round(block.inputs[0] - block.inputs[1])
    return np.stack([np.abs(delta), np.abs(delta * kept(mask, delta, block.start, precision))])


def _lanes_of_magnitudes(run: RawRun, mask: KeepRanked) -> Vector:
    """Return what both rows of a block add up to."""
    from mergefs.kernels.fused.ranking import add_magnitudes

    expert, base = run.inputs
    lanes: Vector = np.zeros((2, LANES), dtype=np.float64)
    marks = survivors_by_rank(mask, expert, base, run.start, run.dtype)
    add_magnitudes(run.dtype, expert, base, marks, lanes)
    return lanes


def _rescale_of_sums(context: TensorContext, answers: Answers, model: int, mask: KeepRanked) -> float | None:
    """Return the ratio of the two sums, rounded as torch rounds it, or None where one of them vanishes."""
    drawn = drawing(Precision(context.compute))
    before, after = (drawn.scalar(float(total)) for total in answers.vector(_rescale_sums(context, model, mask)))
    if before < _SMALLEST_SUM or after < _SMALLEST_SUM:
        return None
    return float(drawn.scalar(float(before / after)))


def _sum(terms: list[Array]) -> Array:
    """Return the sum of ``terms``, accumulated in order from zero."""
    total: Array = np.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _parameters(normalize: bool, rescale: bool, sparsifier: Sparsifier) -> tuple[Parameter, ...]:
    """Return the parameters of the family with a member's own defaults."""
    gamma = Parameter(
        "gamma",
        "float",
        Scope.PER_EXPERT,
        "share of the delta, its largest elements, that is dropped as outliers",
        default=0.01,
        minimum=0.0,
        maximum=1.0,
    )
    epsilon = Parameter(
        "epsilon",
        "float",
        Scope.PER_EXPERT,
        "how far the chance to be kept rises and falls from the density with the rank",
        default=0.15,
        minimum=0.0,
        maximum=1.0,
    )
    return (
        *((gamma,) if sparsifier == "outliers" else (epsilon,) if sparsifier == "ranked" else ()),
        Parameter("weight", "float", Scope.PER_EXPERT, "weight of the expert's delta", required=True),
        Parameter(
            "density",
            "float",
            Scope.PER_EXPERT,
            "share of the delta that is kept",
            default=1.0,
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter("normalize", "bool", Scope.GLOBAL, "divide by the sum of the weights", default=normalize),
        Parameter(
            "rescale",
            "bool",
            Scope.GLOBAL,
            "scale what pruning keeps to the size of the whole",
            default=rescale,
        ),
        Parameter("lambda", "float", Scope.GLOBAL, "factor of the merged delta", default=1.0),
        Parameter("int8_mask", "bool", Scope.GLOBAL, "accepted for mergekit; changes nothing", default=False),
    )


_PRUNED: Final = "where `density` is below 1; with `rescale` also the sums of magnitudes before and after pruning"
_NEEDS: Final[dict[Sparsifier, str]] = {
    "none": "",
    "magnitude": f"the smallest magnitude of each delta that is kept, {_PRUNED}",
    "outliers": f"the smallest and the largest magnitude of each delta that are kept, {_PRUNED}",
    "random": "",
    "ranked": "with `rescale`, the sums of magnitudes of each delta before and after pruning",
}


def _member(name: str, title: str, reference: str, summary: str, sparsifier: Sparsifier, consensus: bool) -> TaskVector:
    """Declare one member of the family."""
    specification = Specification(
        name=name,
        title=title,
        reference=reference,
        summary=summary,
        parameters=_parameters(name in ("ties", "della"), sparsifier in ("random", "ranked"), sparsifier),
        base=BasePolicy.REQUIRED,
        needs=_NEEDS[sparsifier],
    )
    return TaskVector(specification, sparsifier, consensus)


TASK_ARITHMETIC = _member(
    "task_arithmetic",
    "Task arithmetic",
    "https://arxiv.org/abs/2212.04089",
    "The base plus the weighted sum of the experts' deltas.",
    "none",
    False,
)
TIES = _member(
    "ties",
    "TIES",
    "https://arxiv.org/abs/2306.01708",
    "Keeps the largest elements of each delta, elects a sign for each element, and averages who agrees.",
    "magnitude",
    True,
)
DARE_LINEAR = _member(
    "dare_linear",
    "Linear DARE",
    "https://arxiv.org/abs/2311.03099",
    "Drops elements of each delta at random, rescales the rest, and adds the weighted sum.",
    "random",
    False,
)
DARE_TIES = _member(
    "dare_ties",
    "DARE TIES",
    "https://arxiv.org/abs/2311.03099",
    "Drops elements of each delta at random, rescales the rest, and elects a sign for each element.",
    "random",
    True,
)
BREADCRUMBS = _member(
    "breadcrumbs",
    "Model Breadcrumbs",
    "https://arxiv.org/abs/2312.06795",
    "Drops the largest and the smallest elements of each delta, and adds the weighted sum of the rest.",
    "outliers",
    False,
)
BREADCRUMBS_TIES = _member(
    "breadcrumbs_ties",
    "Model Breadcrumbs with TIES",
    "https://arxiv.org/abs/2312.06795",
    "Drops the largest and the smallest elements of each delta, and elects a sign for each element.",
    "outliers",
    True,
)
DELLA = _member(
    "della",
    "DELLA",
    "https://arxiv.org/abs/2406.11617",
    "Drops elements of each delta at random, small ones more often, rescales the rest, and elects signs.",
    "ranked",
    True,
)
DELLA_LINEAR = _member(
    "della_linear",
    "Linear DELLA",
    "https://arxiv.org/abs/2406.11617",
    "Drops elements of each delta at random, small ones more often, rescales the rest, and adds the weighted sum.",
    "ranked",
    False,
)
