"""Model Stock (Jang et al. 2024, arXiv 2403.19522): how far to go from the base to the experts' mean, from angles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

import numpy as np

from mergefs.errors import RecipeError
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.methods.contract import (
    LONGEST_ROW,
    Answers,
    BasePolicy,
    Block,
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
from mergefs.methods.norms import Norms, ask_norms, known_norms, norms_of_rows
from mergefs.methods.rounding import Analysis
from mergefs.methods.sums import MOMENTS, Sums, ask_sums, sums_across_vectors, sums_of_rows

_SMALLEST_PRODUCT = 1e-6
_SINGULAR = 1e-6


@dataclass(frozen=True, slots=True)
class ModelStockCoefficients:
    """How much of the experts' mean enters, or None where each of ``rows`` rows has a share of its own.

    ``row`` is how many elements these have.
    """

    base: int
    experts: tuple[int, ...]
    row: int
    share: float | None
    rows: int = 1


class ModelStock(Method[ModelStockCoefficients]):
    """``t * mean(x) + (1 - t) * base``, where ``t`` follows from the mean cosine between the experts' deltas."""

    specification = Specification(
        name="model_stock",
        title="Model Stock",
        reference="https://arxiv.org/abs/2403.19522",
        summary="Goes from the base towards the experts' mean, as far as the angles between their deltas say.",
        parameters=(Parameter("filter_wise", "bool", Scope.GLOBAL, "take the angles row by row", default=False),),
        base=BasePolicy.REQUIRED,
        min_models=3,
        few_models=FewModels.FALL_BACK_ON_BASE,
        needs="the norms of the deltas and their inner products, unless `filter_wise` is set",
    )

    def check(self, context: TensorContext) -> None:
        """Refuse rows that are too long to be seen whole."""
        if context.shared["filter_wise"] and context.row > LONGEST_ROW:
            raise RecipeError(
                f"tensor {context.name!r} has rows of {context.row} elements, and `filter_wise` takes rows of at most "
                f"{LONGEST_ROW}; set `filter_wise: false`"
            )

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """The norms of the deltas and their products; none where each row has its own, for a kernel sees whole rows."""
        if context.shared["filter_wise"]:
            return ()
        return (_norms(context), *_products(context))

    def coefficients(self, context: TensorContext, answers: Answers) -> ModelStockCoefficients:
        """Turn the angles of the whole tensor into a share, by the steps of rounding that torch takes."""
        if context.base is None:
            raise ValueError("model_stock needs a base")
        share: float | None = None
        if not context.shared["filter_wise"]:
            precision = Precision(context.compute)
            norms = [
                precision.round(np.array([norm], precision.carrier)) for norm in known_norms(answers, _norms(context))
            ]
            products = [answers.vector(wanted) for wanted in _products(context)]
            cosines = _cosines(norms, products, precision)
            share = float(_share(sums_of_rows(np.stack(cosines, axis=1), precision), len(norms), precision)[0])
        rows = context.size // max(1, context.row)
        return ModelStockCoefficients(context.base, context.experts, context.row, share, rows)

    def grain(self, coefficients: ModelStockCoefficients) -> int:
        """Return a row where each has a share of its own."""
        return coefficients.row if coefficients.share is None else 1

    def reference(self, block: Block, coefficients: ModelStockCoefficients, precision: Precision) -> Array:
        """Follow the formula, rounding after each step as torch does in the compute dtype."""
        base = block.inputs[coefficients.base]
        experts = [block.inputs[model] for model in coefficients.experts]
        share: Array = np.array([coefficients.share], dtype=base.dtype)
        if coefficients.share is None:
            first_row = block.start // coefficients.row
            shares = _share_of_rows(base, experts, (coefficients.row, first_row, coefficients.rows), precision)
            share = np.repeat(shares, coefficients.row)
        # From zero, as Python's sum begins: it makes a positive zero of a negative one.
        total = reduce(lambda first, second: precision.round(first + second), experts, np.zeros_like(base))
        mean = precision.round(total / base.dtype.type(len(experts)))
        rest = precision.round(base.dtype.type(1) - share)
        return precision.round(precision.round(share * mean) + precision.round(rest * base))

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes for a merge, and one for each number that it needs to know."""
        return ("model_stock", *MOMENTS)

    def fused(self, run: RawRun, coefficients: ModelStockCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes, where the whole tensor has one share."""
        if run.dtype not in FUSED_DTYPES or coefficients.share is None:
            return None
        import mergefs.kernels.fused.model_stock as kernel
        from mergefs.kernels.fused.memory import address, addresses, empty_result

        base = run.inputs[coefficients.base]
        result = empty_result(base, run.dtype, run.into)
        share = np.float32(coefficients.share)
        rest = Precision(run.dtype).scalar(float(np.float32(1) - share))
        experts = addresses([run.inputs[model] for model in coefficients.experts])
        buffer = np.empty(kernel.TILE, dtype=np.float32)
        kernel.KERNEL.compiled(run.dtype)(result, address(base), experts, share, rest, buffer)
        return result.view(np.uint8)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Linear, with the share of the whole tensor; where each row has its own, the experts' mean is expected."""
        coefficients = self.coefficients(context, answers)
        count = len(coefficients.experts)
        if coefficients.share is None:
            return Response.estimated([0.0 if m == context.base else 1 / count for m in range(context.models)])
        analysis = Analysis(context.models, context.base, context.compute)
        precision = Precision(context.compute)
        total = analysis.input(coefficients.experts[0])
        for model in coefficients.experts[1:]:
            total = analysis.rounded(total + analysis.input(model))
        mean = analysis.rounded(total / count)
        rest = float(precision.scalar(float(precision.carrier(1) - precision.carrier(coefficients.share))))
        parts = analysis.rounded(mean * coefficients.share), analysis.rounded(analysis.base() * rest)
        return Response.linear(analysis, parts[0] + parts[1])


def _norms(context: TensorContext) -> Norms:
    """Ask for the norm of each expert's delta."""
    models = (*context.experts, context.base or 0)
    return ask_norms(
        context.compute, "deltas", models, _deltas_of_block, moments=Moments(based=True), count=len(context.experts)
    )


def _products(context: TensorContext) -> list[Sums]:
    """Ask for the inner product of each pair of deltas, of elements that are rounded as torch rounds them."""
    pairs = combinations(context.experts, 2)
    base = context.base or 0
    moments = Moments(based=True, pairs=((0, 1),))
    return [
        ask_sums(context.compute, "delta products", (*pair, base), _products_of_block, moments=moments, count=1)
        for pair in pairs
    ]


def _deltas_of_block(block: Block, precision: Precision) -> Array:
    *experts, base = block.inputs
    return np.stack([precision.round(expert - base) for expert in experts])


def _products_of_block(block: Block, precision: Precision) -> Array:
    first, second = (precision.round(values - block.inputs[2]) for values in block.inputs[:2])
    return precision.round(first * second)[None]


def _share_of_rows(base: Array, experts: Sequence[Array], place: tuple[int, int, int], precision: Precision) -> Array:
    """Return the share of each row of a block; ``place`` are their length, the first one and how many there are."""
    row, first_row, rows = place
    deltas = [precision.round(expert - base).reshape(-1, row) for expert in experts]
    norms = [norms_of_rows(delta, precision) for delta in deltas]
    products = [sums_of_rows(precision.round(first * second), precision) for first, second in combinations(deltas, 2)]
    cosines = np.stack(_cosines(norms, products, precision))
    total = sums_across_vectors(cosines, first_row, rows, precision)
    return _share(total, len(norms), precision)


def _cosines(norms: Sequence[Array], products: Sequence[Array], precision: Precision) -> list[Array]:
    """Return the cosines of the angles of each pair, from norms and from inner products that are not rounded yet."""
    kind = precision.carrier
    cosines = []
    for (first, second), product in zip(combinations(norms, 2), products, strict=True):
        length = np.maximum(precision.round(first * second), precision.scalar(_SMALLEST_PRODUCT))
        cosines.append(np.clip(precision.round(precision.round(product.astype(kind)) / length), -1, 1))
    return cosines


def _share(total: Array, count: int, precision: Precision) -> Array:
    """Return how much of the mean of ``count`` experts enters, from the sum of the cosines of all pairs.

    The share is 0 where no finite one follows from the angles.
    """
    kind = precision.carrier
    cosine = precision.round((total / total.dtype.type(math.comb(count, 2))).astype(kind))
    denominator = precision.round(kind(1) + precision.round(kind(count - 1) * cosine))
    singular = np.abs(denominator) < precision.scalar(_SINGULAR)
    share = precision.round(precision.round(kind(count) * cosine) / np.where(singular, kind(1), denominator))
    return np.where(singular, kind(0), share)
