"""Spherical interpolation of two models, or of what they add to a base (mergekit's "NuSLERP").

The angle is that between whole tensors, between their rows (the last dimension), or between their columns (runs along
the first dimension).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F64
from mergefs.errors import RecipeError
from mergefs.kernels.elementary import arc_cosine, sine
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.methods.contract import (
    LONGEST_ROW,
    Answers,
    BasePolicy,
    Block,
    ColumnSums,
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
from mergefs.methods.rounding import Analysis, Form
from mergefs.methods.sums import MOMENTS, Sums, ask_sums, sums_of_rows

Part = Literal["whole", "rows", "columns"]

_SMALLEST_NORM: Final = 1e-7
_COLINEAR: Final = 1e-16
_SMALLEST_WEIGHT: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Turn:
    """How far to turn, for each part of a tensor that has an angle of its own: arrays of one value for each part.

    ``first`` and ``second`` are the sines that the two inputs are weighed by, ``divisor`` that of the whole angle;
    ``straight`` says where the two are colinear and a line is taken.
    """

    first: Array
    second: Array
    divisor: Array
    straight: NDArray[np.bool_]

    def of_elements(self, spread: Callable[[NDArray[Any]], NDArray[Any]]) -> "Turn":
        """Return the turn of each element of a run; ``spread`` gives the values of the parts that these belong to."""
        return Turn(spread(self.first), spread(self.second), spread(self.divisor), spread(self.straight))


@dataclass(frozen=True, slots=True)
class NuslerpCoefficients:
    """Which inputs take part, how far ``share`` to go to the second, and the turn; None where each row has its own."""

    base: int | None
    pair: tuple[int, int]
    share: float
    row: int
    turn: Turn | None


class Nuslerp(Method[NuslerpCoefficients]):
    """``(sin((1-t) angle) * a + sin(t angle) * b) / sin(angle)``, rounded to the compute dtype at each step."""

    specification = Specification(
        name="nuslerp",
        title="NuSLERP",
        reference="https://en.wikipedia.org/wiki/Slerp",
        summary="Spherical interpolation between two models, or between what they add to a base.",
        parameters=(
            Parameter("weight", "float", Scope.PER_EXPERT, "share of the model; only ratios matter", required=True),
            Parameter("nuslerp_flatten", "bool", Scope.GLOBAL, "take one angle for the whole tensor", default=True),
            Parameter(
                "nuslerp_row_wise",
                "bool",
                Scope.GLOBAL,
                "without nuslerp_flatten: an angle for each column (first dimension) instead of each row (last)",
                default=False,
            ),
        ),
        base=BasePolicy.OPTIONAL,
        min_models=2,
        max_models=3,
        min_experts=2,
        max_experts=2,
        few_models=FewModels.TAKE_ONE,
        needs="the norms of both tensors, then the inner product of their directions, unless rows have angles",
    )

    def check(self, context: TensorContext) -> None:
        """Refuse rows that are too long to be seen whole, and more columns than memory should hold."""
        part = _part(context)
        length = {"whole": 0, "rows": context.row, "columns": context.columns}[part]
        if length > LONGEST_ROW:
            having = f"rows of {length} elements" if part == "rows" else f"{length} columns"
            raise RecipeError(
                f"tensor {context.name!r} has {having}, and nuslerp takes at most {LONGEST_ROW} where it does not take "
                "one angle for the whole tensor; set `nuslerp_flatten: true`"
            )

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        """The norms of both inputs; none where each row has its own, for a kernel sees whole rows."""
        part = _part(context)
        return () if part == "rows" else (_whole_norms(context),) if part == "whole" else _column_squares(context)

    def further_statistics(self, context: TensorContext, answers: Answers) -> tuple[Statistic, ...]:
        """The inner product of the two directions, whose elements are rounded as torch rounds them."""
        if _part(context) == "rows":
            return ()
        wanted = _products(context, answers)
        return () if wanted in answers else (wanted,)

    def coefficients(self, context: TensorContext, answers: Answers) -> NuslerpCoefficients:
        """Turn the weights into a share, and the inner product into a turn."""
        share, turn = _share(context), None
        if _part(context) != "rows":
            turn = _turn(answers.vector(_products(context, answers)), share, Precision(context.compute))
        return NuslerpCoefficients(context.base, _pair(context), share, context.row, turn)

    def grain(self, coefficients: NuslerpCoefficients) -> int:
        """Return a row where each has an angle of its own."""
        return coefficients.row if coefficients.turn is None else 1

    def reference(self, block: Block, coefficients: NuslerpCoefficients, precision: Precision) -> Array:
        """Follow the formula, rounding after each step as torch does in the compute dtype."""
        base = None if coefficients.base is None else block.inputs[coefficients.base]
        first, second = (_delta(block.inputs[model], base, precision) for model in coefficients.pair)
        if coefficients.turn is None:
            turn = _turn_of_rows(first, second, coefficients, precision)
        else:
            turn = coefficients.turn.of_elements(lambda parts: _of_columns(parts, block.start, first.size))
        bent = precision.round(_weighed(first, second, turn.first, turn.second, precision) / turn.divisor)
        kind = precision.carrier
        line = _weighed(first, second, kind(1 - coefficients.share), kind(coefficients.share), precision)
        result: Array = np.where(turn.straight, line, bent)
        return result if base is None else precision.round(base + result)

    def kernels(self) -> tuple[str, ...]:
        """One pass over the bytes for a merge, and two for what it needs to know."""
        return ("nuslerp", *MOMENTS)

    def fused(self, run: RawRun, coefficients: NuslerpCoefficients) -> Raw | None:
        """Do the same in one pass over the bytes, where the whole tensor has one angle."""
        turn = coefficients.turn
        if run.dtype not in FUSED_DTYPES or turn is None or turn.divisor.size != 1:
            return None
        import mergefs.kernels.fused.nuslerp as kernel
        from mergefs.kernels.fused.memory import addresses, empty_result

        base = () if coefficients.base is None else (run.inputs[coefficients.base],)
        inputs = (*(run.inputs[model] for model in coefficients.pair), *base)
        result = empty_result(inputs[0], run.dtype, run.into)
        straight = bool(turn.straight[0])
        line = (1 - coefficients.share, coefficients.share)
        factors = np.array(line if straight else (turn.first[0], turn.second[0]), dtype=np.float32)
        kernel.KERNEL.compiled(run.dtype)(result, addresses(inputs), factors, not straight, np.float32(turn.divisor[0]))
        return result.view(np.uint8)

    def response(self, context: TensorContext, answers: Answers) -> Response:
        """Linear where the whole tensor has one angle; where each column has its own, their factors vary.

        Where each row has its own, they are expected to be about the shares, since the angles of fine-tunes are small.
        """
        coefficients = self.coefficients(context, answers)
        turn, pair = coefficients.turn, coefficients.pair
        if turn is not None and turn.divisor.size == 1:
            return _response_to_turn(context, coefficients, turn)
        if turn is None or not turn.divisor.size:
            shares = dict(zip(pair, (1 - coefficients.share, coefficients.share), strict=True))
            return Response.estimated([shares.get(model, 0.0) for model in range(context.models)])
        line = (1 - coefficients.share, coefficients.share)
        factors, spreads = [0.0] * context.models, [0.0] * context.models
        for model, part, straight in zip(pair, (turn.first, turn.second), line, strict=True):
            of_columns = np.where(turn.straight, straight, part / np.where(turn.straight, 1, turn.divisor))
            factors[model], spreads[model] = float(of_columns.mean()), float(of_columns.var())
        return Response.estimated(factors, spreads)


def _response_to_turn(context: TensorContext, coefficients: NuslerpCoefficients, turn: Turn) -> Response:
    """Return the response where the whole tensor has one angle: linear."""
    analysis = Analysis(context.models, context.base, context.compute)
    line = analysis.number(1 - coefficients.share), analysis.number(coefficients.share)
    straight = bool(turn.straight[0])
    factors = line if straight else (float(turn.first[0]), float(turn.second[0]))
    mixed: Form = analysis.zero()
    for model, factor in zip(coefficients.pair, factors, strict=True):
        values = analysis.input(model) if context.base is None else analysis.delta(model)
        mixed = mixed + analysis.rounded(values * factor)
    if not straight:
        mixed = analysis.rounded(mixed) / float(turn.divisor[0])
    if context.base is None:
        return Response.linear(analysis, mixed)
    return Response.linear(analysis, analysis.base() + analysis.rounded(mixed))


def _part(context: TensorContext) -> Part:
    """Return which part of a tensor has an angle of its own."""
    if context.shared["nuslerp_flatten"] or (context.shared["nuslerp_row_wise"] and context.columns == 1):
        return "whole"
    return "columns" if context.shared["nuslerp_row_wise"] else "rows"


def _pair(context: TensorContext) -> tuple[int, int]:
    """Return the indices of the two models."""
    first, second = context.experts
    return first, second


def _share(context: TensorContext) -> float:
    """Return how far to go to the second model; half of the way where the weights add up to nothing."""
    first, second = (context.number("weight", model) for model in _pair(context))
    total = first + second
    return 0.5 if abs(total) < _SMALLEST_WEIGHT else second / total


def _delta(values: Array, base: Array | None, precision: Precision) -> Array:
    """Return what a model adds to the base, or without one the model itself."""
    return values if base is None else precision.round(values - base)


def _weighed(first: Array, second: Array, one: Any, other: Any, precision: Precision) -> Array:
    """Return ``one * first + other * second``, rounded at each step."""
    return precision.round(precision.round(one * first) + precision.round(other * second))


# What is summed over whole tensors, or over each column


def _models(context: TensorContext) -> tuple[int, ...]:
    """Return the inputs that statistics look at: the two models, then the base where there is one."""
    return _pair(context) if context.base is None else (*_pair(context), context.base)


def _deltas(block: Block, precision: Precision) -> list[Array]:
    """Return the two inputs of a statistic, less the base where it follows them."""
    base = block.inputs[2] if len(block.inputs) > 2 else None
    return [_delta(values, base, precision) for values in block.inputs[:2]]


def _stacked_deltas(block: Block, precision: Precision) -> Array:
    return np.stack(_deltas(block, precision))


def _whole_norms(context: TensorContext) -> Norms:
    """Ask for the norms of both models, or of both deltas."""
    name = "models" if context.base is None else "deltas"
    return ask_norms(
        context.compute, name, _models(context), _stacked_deltas, moments=Moments(context.base is not None), count=2
    )


def _column_squares(context: TensorContext) -> tuple[ColumnSums, ...]:
    """Ask for the squared norms of the columns of both, which torch adds up in float32 one row after the other."""
    name = "squares of a model" if context.base is None else "squares of a delta"
    base = () if context.base is None else (context.base,)
    single = context.compute != F64

    def squares(block: Block, precision: Precision) -> Array:
        values, *base = block.inputs
        delta = _delta(values, base[0] if base else None, precision)
        return delta * delta

    return tuple(
        ColumnSums(name, (model, *base), squares, columns=context.columns, single=single) for model in _pair(context)
    )


def _lengths(context: TensorContext, answers: Answers) -> list[Array]:
    """Return what both are divided by: one number each, or one for each column."""
    precision = Precision(context.compute)
    if _part(context) == "whole":
        norms = [np.array([norm]) for norm in known_norms(answers, _whole_norms(context))]
    else:
        norms = [np.sqrt(answers.vector(squares).astype(precision.carrier)) for squares in _column_squares(context)]
    return [_length(precision.round(norm.astype(precision.carrier)), precision) for norm in norms]


def _length(norms: Array, precision: Precision) -> Array:
    """Return what vectors are divided by, from their norms."""
    return np.maximum(norms, precision.scalar(_SMALLEST_NORM))


def _products(context: TensorContext, answers: Answers) -> Sums | ColumnSums:
    """Ask for the inner product of the two directions, for the whole or for each column."""
    lengths = _lengths(context, answers)

    def products(block: Block, precision: Precision) -> Array:
        deltas = _deltas(block, precision)
        spread = [_of_columns(length, block.start, deltas[0].size) for length in lengths]
        first, second = (precision.round(delta / length) for delta, length in zip(deltas, spread, strict=True))
        return precision.round(first * second)

    name = "products of directions" if context.base is None else "products of directions of deltas"
    if _part(context) == "whole":
        divisors = tuple(float(length[0]) for length in lengths)
        moments = Moments(context.base is not None, divisors, pairs=((0, 1),))
        rows = partial(_as_row, terms=products)
        return ask_sums(context.compute, name, _models(context), rows, moments=moments, count=1)
    return ColumnSums(name, _models(context), products, columns=context.columns)


def _as_row(block: Block, precision: Precision, terms: Callable[[Block, Precision], Array]) -> Array:
    return terms(block, precision)[None]


def _turn(products: Array, share: float, precision: Precision) -> Turn:
    """Return how far to turn, from the inner product of two directions."""
    kind = precision.carrier
    cosine = np.clip(precision.round(products.astype(kind)), -1, 1)
    straight = precision.round(kind(1) - precision.round(cosine * cosine)) <= precision.scalar(_COLINEAR)
    angle = arc_cosine(np.where(straight, kind(0), cosine), precision)
    first, second = (sine(precision.round(kind(part) * angle), precision) for part in (1 - share, share))
    return Turn(first, second, sine(angle, precision), straight)


def _turn_of_rows(first: Array, second: Array, coefficients: NuslerpCoefficients, precision: Precision) -> Turn:
    """Return the turn of each element of a block of whole rows."""
    row = coefficients.row
    rows = [delta.reshape(-1, row) for delta in (first, second)]
    lengths = [_length(norms_of_rows(delta, precision), precision) for delta in rows]
    directions = [precision.round(delta / length[:, None]) for delta, length in zip(rows, lengths, strict=True)]
    products = sums_of_rows(precision.round(directions[0] * directions[1]), precision)
    return _turn(products, coefficients.share, precision).of_elements(lambda parts: np.repeat(parts, row))


def _of_columns(parts: NDArray[Any], start: int, count: int) -> NDArray[Any]:
    """Return the values of the columns that a run of elements belongs to; all are the same where there is but one."""
    return parts if parts.size == 1 else parts[np.arange(start, start + count) % parts.size]
