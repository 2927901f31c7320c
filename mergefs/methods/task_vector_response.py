"""How merges of the task-vector family answer to their inputs: see ``Response``."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

from mergefs.kernels.random import UNIFORM_BITS
from mergefs.methods.contract import Response, TensorContext
from mergefs.methods.masks import KeepLargest, KeepNone, KeepRandom, KeepRanked, Mask
from mergefs.methods.rounding import Analysis

if TYPE_CHECKING:
    from mergefs.methods.task_vector import ExpertCoefficients, TaskVectorCoefficients

_SMALLEST_DENSITY: Final = 1e-300


def task_vector_response(
    context: TensorContext, coefficients: "TaskVectorCoefficients", densities: Sequence[float]
) -> Response:
    """Return the response; ``densities`` are the shares of the elements that each expert's mask keeps."""
    if coefficients.consensus:
        return _elected(context, coefficients, densities)
    whole = _without_masks(context, coefficients)
    factors, spreads = list(whole.factors), list(whole.spreads)
    for expert, density in zip(coefficients.experts, densities, strict=True):
        kept = _kept_energy(expert.mask, density)
        factors[expert.model] *= kept
        spreads[expert.model] = whole.factors[expert.model] * whole.factors[expert.model] * kept * (1 - kept)
    if whole.largest is None or not all(map(math.isfinite, spreads)):
        return Response.estimated(factors, spreads)
    by_magnitude = any(isinstance(e.mask, KeepLargest | KeepRanked) for e in coefficients.experts)
    return replace(whole, factors=tuple(factors), spreads=tuple(spreads), fixed=not by_magnitude)


def _without_masks(context: TensorContext, coefficients: "TaskVectorCoefficients") -> Response:
    """Return the response where every mask keeps everything: the largest factors, and roundings, that there can be."""
    analysis = Analysis(context.models, context.base, context.compute)
    mixed = analysis.zero()
    for expert in coefficients.experts:
        delta = analysis.delta(expert.model)
        if expert.rescale is not None:
            delta = analysis.rounded(delta * analysis.number(expert.rescale))
        mixed = analysis.carried(mixed + analysis.rounded(delta * expert.weight))
    mixed = analysis.rounded(mixed)
    if coefficients.normalize and coefficients.divisor is not None:
        mixed = analysis.rounded(mixed / coefficients.divisor)
    if coefficients.scale is not None:
        mixed = analysis.rounded(mixed * analysis.number(coefficients.scale))
    return Response.linear(analysis, analysis.base() + (mixed if coefficients.experts else analysis.zero()))


def _elected(context: TensorContext, coefficients: "TaskVectorCoefficients", densities: Sequence[float]) -> Response:
    """Return what may be expected where signs are elected: half of the others' kept elements agree with one's own."""
    factors, spreads = [0.0] * context.models, [0.0] * context.models
    scale = 1.0 if coefficients.scale is None else coefficients.scale
    for expert, density in zip(coefficients.experts, densities, strict=True):
        factor = expert.weight * scale * (1.0 if expert.rescale is None else expert.rescale)
        if coefficients.normalize:
            factor /= _expected_divisor(expert, coefficients.experts, densities) or 1.0
        kept = _kept_energy(expert.mask, density)
        factors[expert.model] = factor * kept
        spreads[expert.model] = factor * factor * kept * (1 - kept)
    return Response.estimated(factors, spreads)


def _expected_divisor(
    expert: "ExpertCoefficients", experts: Sequence["ExpertCoefficients"], densities: Sequence[float]
) -> float:
    """Return the weight that is expected to agree at an element that ``expert`` keeps."""
    others = (
        other.weight * density / 2 for other, density in zip(experts, densities, strict=True) if other is not expert
    )
    return expert.weight + sum(others)


def _kept_energy(mask: Mask, density: float) -> float:
    """Return the share of a delta's squared norm that a mask is expected to keep.

    Magnitudes are taken as those of a normal distribution; of the outliers that are dropped nothing is assumed. Where
    the chance rises with the rank, by 2 epsilon from the smallest to the largest, the energy has 1/2 + 1/pi of it
    behind itself: the mean of z**2 * erf(|z| / sqrt(2)) of a normal z.
    """
    if isinstance(mask, KeepNone):
        return 0.0
    if isinstance(mask, KeepRandom):
        return mask.limit / (1 << UNIFORM_BITS)
    if isinstance(mask, KeepRanked):
        return min(1.0, max(0.0, density + 2 * mask.epsilon / math.pi))
    if isinstance(mask, KeepLargest) and mask.outliers is None and _SMALLEST_DENSITY < density < 1:
        normal = NormalDist()
        beyond = -normal.inv_cdf(density / 2)
        return min(1.0, density + 2 * beyond * normal.pdf(beyond))
    return density
