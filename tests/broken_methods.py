"""Merge methods that each break one promise, beside the sound one that they are made from."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from mergefs.errors import RecipeError
from mergefs.kernels.precision import Array, Precision, Raw
from mergefs.methods.contract import (
    Answers,
    BasePolicy,
    Block,
    ElementSum,
    MagnitudeThreshold,
    Method,
    Parameter,
    RawRun,
    Response,
    Scope,
    Specification,
    Statistic,
    TensorContext,
)


def terms(block: Block, precision: Precision, power: float) -> Array:
    return np.abs(block.inputs[0].astype(np.float64)) ** power


def power_sum(power: float, model: int = 0) -> ElementSum:
    return ElementSum("power sum", (model,), lambda block, precision: terms(block, precision, power), (power,))


class Sound(Method[tuple[float, int]]):
    """The mean of the models, times a factor that grows with the sum of a power of the first one."""

    specification = Specification(
        name="sound",
        title="Sound",
        reference="https://example.org/sound",
        summary="Keeps every promise.",
        parameters=(
            Parameter("power", "float", Scope.GLOBAL, "of the magnitudes", default=1.0, minimum=1.0, maximum=3.0),
        ),
        base=BasePolicy.REQUIRED,
        needs="the sum of a power",
    )

    def statistics(self, context: TensorContext) -> tuple[Statistic, ...]:
        return (power_sum(context.number("power")),)

    def coefficients(self, context: TensorContext, answers: Answers) -> tuple[float, int]:
        total = answers.number(power_sum(context.number("power")))
        return total / (1 + total), context.row

    def reference(self, block: Block, coefficients: tuple[float, int], precision: Precision) -> Array:
        total: Array = np.sum(block.inputs, axis=0, dtype=precision.carrier)
        return precision.round(total * precision.carrier(coefficients[0] / len(block.inputs)))

    def response(self, context: TensorContext, answers: Answers) -> Response:
        factor = self.coefficients(context, answers)[0]
        factors = [0.0 if model == context.base else factor / context.models for model in range(context.models)]
        return Response.known(factors, offset=factor - 1)


@dataclass(frozen=True, slots=True)
class Broken:
    """A broken method, the check that finds it, and what that says."""

    make: Callable[[], Method[Any]]
    check: str
    words: str


def with_methods(**functions: Any) -> Callable[[], Method[Any]]:
    """Return what makes the sound method with some of its methods replaced."""
    changed: Callable[[], Method[Any]] = type("Changed", (Sound,), functions)
    return changed


def with_specification(**changes: Any) -> Callable[[], Method[Any]]:
    """Return what makes the sound method with another specification."""
    return with_methods(specification=replace(Sound.specification, **changes))


def with_parameter(**changes: Any) -> Callable[[], Method[Any]]:
    """Return what makes the sound method with another parameter."""
    return with_specification(parameters=(replace(Sound.specification.parameters[0], **changes),))


def with_response(change: Callable[[Response], Response]) -> Callable[[], Method[Any]]:
    """Return what makes the sound method with another response."""
    return with_methods(response=lambda self, context, answers: change(Sound.response(self, context, answers)))


def _changing(value: Callable[[Array], Array]) -> Callable[..., Array]:
    """Return a reference that does something to what the sound one returns."""

    def reference(self: Sound, block: Block, coefficients: Any, precision: Precision) -> Array:
        return value(Sound.reference(self, block, coefficients, precision))

    return reference


def _writing(self: Sound, block: Block, coefficients: Any, precision: Precision) -> Array:
    first = block.inputs[0]
    first *= precision.carrier(0.5)
    return precision.round(first)


def _unrounded(self: Sound, block: Block, coefficients: Any, precision: Precision) -> Array:
    return block.inputs[0] * precision.carrier(0.3)


def _counting() -> Callable[..., Array]:
    calls = itertools.count()
    return _changing(lambda values: values * values.dtype.type(1 + next(calls) % 2))


def _from_zero(self: Sound, block: Block, coefficients: Any, precision: Precision) -> Array:
    return precision.round(np.arange(block.inputs[0].size).astype(precision.carrier))


def _by_rows(self: Sound, block: Block, coefficients: tuple[float, int], precision: Precision) -> Array:
    with_rows = block.inputs[0].reshape(-1, coefficients[1])
    return precision.round((with_rows - with_rows.max(axis=1, keepdims=True, initial=-1)).reshape(-1))


def _fused(factor: float) -> Callable[..., Raw | None]:
    def fused(self: Sound, run: RawRun, coefficients: Any) -> Raw | None:
        return (run.inputs[0].astype(np.uint8) ^ np.uint8(factor)).astype(np.uint8)

    return fused


def _beyond(self: Sound, run: RawRun, coefficients: Any) -> Raw | None:
    """Write to the memory around that of the result."""
    if run.into is not None and run.into.base is not None:
        run.into.base[:] = 0
    return run.inputs[0]


def _otherwise(self: Sound, run: RawRun, coefficients: Any) -> Raw | None:
    """Return the first input, and in memory of the caller's zeros."""
    if run.into is None:
        return run.inputs[0]
    run.into[:] = 0
    return run.into


def _first(self: Sound, block: Block, coefficients: Any, precision: Precision) -> Array:
    return block.inputs[0]


def _asking(*wanted: Callable[[TensorContext], Statistic]) -> dict[str, Any]:
    """Return what makes a method ask for statistics, and do without the answers."""

    def statistics(self: Sound, context: TensorContext) -> tuple[Statistic, ...]:
        return tuple(one(context) for one in wanted)

    return {"statistics": statistics, "coefficients": lambda self, context, answers: (0.5, context.row)}


def _sum_of(function: Callable[[Block, Precision], Array]) -> Callable[[TensorContext], Statistic]:
    return lambda context: ElementSum("sum", (0,), function)


def _forever(self: Sound, context: TensorContext, answers: Answers) -> tuple[Statistic, ...]:
    return (power_sum(1.0),)


def _refuse(self: Sound, context: TensorContext) -> None:
    raise RecipeError("never")


BROKEN: Final[dict[str, Broken]] = {
    "name": Broken(with_specification(name="not-sound"), "specification", "its name is not made of"),
    "title": Broken(with_specification(title=" "), "specification", "it has no title"),
    "summary": Broken(with_specification(summary="No stop"), "specification", "its summary is not one line"),
    "address": Broken(with_specification(reference="arXiv"), "specification", "its reference is no https"),
    "no models": Broken(with_specification(min_models=0), "specification", "min_models is 0"),
    "few models": Broken(with_specification(max_models=0), "specification", "max_models 0 is below min_models 1"),
    "base": Broken(with_specification(base="required"), "specification", "its base is no BasePolicy"),
    "few": Broken(with_specification(few_models="base"), "specification", "its few_models is no FewModels"),
    "twice": Broken(
        with_specification(parameters=2 * Sound.specification.parameters), "specification", "is declared twice"
    ),
    "no specification": Broken(with_methods(specification=None), "specification", "Changed is a NoneType"),
    "meaning": Broken(with_parameter(meaning=""), "specification", "parameter 'power' has no meaning"),
    "required": Broken(with_parameter(required=True), "specification", "is required and has a default"),
    "range": Broken(with_parameter(minimum=4.0), "specification", "has its minimum above its maximum"),
    "default": Broken(with_parameter(default=9.0), "specification", "outside of its own range"),
    "kind": Broken(with_parameter(default=True), "specification", "the default True of parameter 'power' is no float"),
    "scope": Broken(with_parameter(scope="global"), "specification", "the scope of parameter 'power' is no Scope"),
    "kernel": Broken(with_methods(kernels=lambda self: ("none",)), "kernels", "ModuleNotFoundError"),
    "shape": Broken(with_methods(reference=_changing(lambda v: v[:, None])), "results", "1) for"),
    "carrier": Broken(with_methods(reference=_changing(lambda v: v.astype(np.float16))), "results", "returns float16"),
    "unrounded": Broken(with_methods(reference=_unrounded), "results", "values that"),
    "writes": Broken(with_methods(reference=_writing), "results", "reference raises ValueError: "),
    "empty": Broken(with_methods(reference=_changing(lambda v: v + 0 * v[0])), "results", "raises IndexError"),
    "NaN": Broken(
        with_methods(coefficients=lambda self, c, a: (int(a.number(power_sum(c.number("power")))), 1)),
        "results",
        "coefficients raises",
    ),
    "chance": Broken(with_methods(reference=_counting()), "results", "other values the second time"),
    "taken": Broken(with_methods(taken_as_it_is=lambda self, c: 0), "results", "but the reference returns something"),
    "taken from nowhere": Broken(with_methods(taken_as_it_is=lambda self, c: 9), "results", "input 9, which is none"),
    "impossible": Broken(with_methods(check=_refuse), "results", "`check` refuses every case"),
    "mean of a block": Broken(
        with_methods(reference=_changing(lambda v: v - np.sum(v != 0, dtype=v.dtype))), "ranges", "the ranges between"
    ),
    "place": Broken(with_methods(reference=_from_zero), "ranges", "must count them from `block.start`"),
    "grain": Broken(with_methods(grain=lambda self, c: 7), "ranges", "do not consist of a grain of 7"),
    "no grain": Broken(with_methods(reference=_by_rows), "ranges", "reference raises ValueError: cannot reshape"),
    "fused bits": Broken(
        with_methods(reference=_first, fused=_fused(1)), "fused", "the fused kernel differs from the reference"
    ),
    "fused size": Broken(
        with_methods(fused=lambda self, run, c: run.inputs[0][:-1]), "fused", "the fused kernel returns"
    ),
    "fused beyond": Broken(
        with_methods(reference=_first, fused=_beyond), "fused", "writes beyond the memory for its result"
    ),
    "fused otherwise": Broken(
        with_methods(reference=_first, fused=_otherwise), "fused", "differs where it is given memory"
    ),
    "keep": Broken(
        with_methods(**_asking(lambda context: MagnitudeThreshold(0, context.size + 1))),
        "statistics",
        "raises ValueError: MagnitudeThreshold(",
    ),
    "delta of the base": Broken(
        with_methods(**_asking(lambda context: MagnitudeThreshold(context.base or 0, max(1, context.size)))),
        "statistics",
        "is about a model that has no delta",
    ),
    "without words": Broken(
        with_specification(needs=""), "statistics", "`needs` of its specification does not say which"
    ),
    "no such model": Broken(
        with_methods(**_asking(lambda context: power_sum(1.0, 9))), "statistics", "looks at models (9,) of"
    ),
    "terms of a block": Broken(
        with_methods(**_asking(_sum_of(lambda block, precision: np.cumsum(block.inputs[0] != 0)))),
        "statistics",
        "are others when a block ends after element",
    ),
    "without end": Broken(with_methods(further_statistics=_forever), "statistics", "after 64 passes it still asks for"),
    "key": Broken(
        with_methods(
            **_asking(
                lambda context: ElementSum(
                    "power sum", (0,), lambda block, precision: terms(block, precision, context.number("power"))
                )
            )
        ),
        "statistic keys",
        "all that its terms depend on belongs into `arguments`",
    ),
    "number of factors": Broken(
        with_response(lambda found: replace(found, factors=(*found.factors, 0.0))), "response", "factors for"
    ),
    "factor of the base": Broken(
        with_response(lambda found: Response.known([1.0] * len(found.factors))), "response", "are not 0 of the base"
    ),
    "infinite factor": Broken(
        with_response(lambda found: replace(found, factors=(np.inf,) * len(found.factors))),
        "response",
        "not all finite",
    ),
    "infinite offset": Broken(
        with_response(lambda found: replace(found, offset=np.nan)), "response", "its offset nan is not finite"
    ),
    "negative spread": Broken(
        with_response(lambda found: replace(found, spreads=(-1.0, *found.spreads[1:]))), "response", "spreads"
    ),
    "fixed without a bound": Broken(
        with_response(lambda found: replace(found, largest=None, fixed=True)), "response", "says nothing of the largest"
    ),
    "bound below the factor": Broken(
        with_response(
            lambda found: replace(found, largest=tuple(abs(factor) / 2 for factor in found.factors), fixed=False)
        ),
        "response",
        "are beyond the largest",
    ),
    "response raises": Broken(
        with_methods(response=lambda self, context, answers: 1 / 0), "response", "response raises ZeroDivisionError"
    ),
    "other factors": Broken(
        with_response(lambda found: replace(found, factors=tuple(0.9 * factor for factor in found.factors))),
        "linearity",
        "it is not linear with the factors",
    ),
    "too small a bound": Broken(
        with_response(lambda found: Response.known([0.9 * factor for factor in found.factors], found.offset)),
        "linearity",
        "do not bound what becomes of shares",
    ),
    "not linear": Broken(with_methods(reference=_changing(np.abs)), "linearity", "instead of at most"),
    "coarse": Broken(
        with_methods(reference=_changing(lambda values: np.round(values * 64) / 64)), "linearity", "instead of at most"
    ),
    "offset": Broken(
        with_response(lambda found: replace(found, offset=found.offset + 0.25)),
        "linearity",
        "it does not make the base with the offset",
    ),
}
