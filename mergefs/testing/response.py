"""Checks of what a method tells the planner: how the result answers to the inputs."""

from dataclasses import replace
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.precision import Array, store
from mergefs.methods.contract import Method, Response
from mergefs.methods.rounding import largest_number, smallest_change, unit_of_results
from mergefs.testing.answers import gather
from mergefs.testing.cases import Case
from mergefs.testing.choices import Choices
from mergefs.testing.trial import Trial, for_each_trial

_Exact: TypeAlias = NDArray[np.longdouble]

_WITHOUT_ROUNDING: Final = 64
"""So many times the unit roundoff a linear merge may be off that does not say how it rounds."""


def check_response(method: Method[Any]) -> None:
    """There are finite numbers for each input, none for the base, of any data; and bounds are not below estimates."""
    for_each_trial(method, _check_response)


def _check_response(trial: Trial, choices: Choices) -> None:
    context, found = trial.case.context, _response(trial)
    for name, numbers in (("factors", found.factors), ("spreads", found.spreads), ("largest", found.largest)):
        if numbers is None:
            continue
        trial.require(len(numbers) == context.models, f"it has {len(numbers)} {name} for {context.models} inputs")
        trial.require(bool(np.isfinite(numbers).all()), f"its {name} {numbers} are not all finite")
        trial.require(context.base is None or numbers[context.base] == 0, f"its {name} {numbers} are not 0 of the base")
    trial.require(bool(np.isfinite(found.offset)), f"its offset {found.offset} is not finite")
    trial.require(min(found.spreads) >= 0, f"its spreads {found.spreads} are not all variances")
    trial.require(not found.fixed or found.largest is not None, "it is fixed and says nothing of the largest factors")
    if found.largest is not None:
        below = np.array(found.largest) < np.abs(found.factors)
        trial.require(not below.any(), f"its factors {found.factors} are beyond the largest {found.largest}")


def check_linearity(method: Method[Any]) -> None:
    """Where a response is certain, leaving out deltas, or knowing them approximately, does to the merge what it says.

    Of a fixed response the difference is the linear combination itself, of any other with ``largest`` no more than
    that bounds; within the roundings that ``rounding`` bounds.
    """
    for_each_trial(method, _check_linearity, finite=True)


def _check_linearity(trial: Trial, choices: Choices) -> None:
    found = _response(trial)
    if found.largest is None or not trial.case.context.size:
        return
    case, context = trial.case, trial.case.context
    generator = np.random.default_rng(choices.integer(0, 2**32 - 1))
    base = case.values().inputs[context.base] if context.base is not None else _stand_in(case, generator)
    left = [choices.pick((0.0, 0.0, 1.0, 0.5) if found.fixed else (0.0, 1.0)) for _ in range(context.models)]
    other = replace(case, raws=tuple(_nearer(case, raw, base, share) for raw, share in enumerate(left)))
    coefficients = trial.coefficients()
    results = [trial.reference(coefficients), Trial(trial.method, other).reference(coefficients)]
    deltas = [_deltas(one, base) for one in (case, other)]
    if not _certainly_finite(found, deltas, base, trial):
        return
    change = results[0].astype(np.longdouble) - results[1]
    moved = deltas[0] - deltas[1]
    slack = _rounding(found, deltas[0], base, trial) + _rounding(found, deltas[1], base, trial)
    largest = np.array(found.largest, dtype=np.longdouble) @ np.abs(moved)
    trial.require(
        bool((np.abs(change) <= largest + slack).all()),
        f"its largest factors {found.largest} do not bound what becomes of shares {left} of the deltas: "
        f"{_worst(np.abs(change), largest + slack)}",
    )
    if found.fixed and not any(found.spreads):
        expected = np.array(found.factors, dtype=np.longdouble) @ moved
        trial.require(
            bool((np.abs(change - expected) <= slack).all()),
            f"it is not linear with the factors {found.factors} where shares {left} of the deltas are left: "
            f"{_worst(np.abs(change - expected), slack)}",
        )
    _check_offset(trial, found, coefficients, base)


def _check_offset(trial: Trial, found: Response, coefficients: Any, base: Array) -> None:
    """Require that a merge of nothing but the base is the base, times one more than the offset."""
    alike = replace(trial.case, raws=tuple(_raw(trial.case, base) for _ in trial.case.raws))
    change = Trial(trial.method, alike).reference(coefficients).astype(np.longdouble) - base
    slack = _rounding(found, _deltas(alike, base), base, trial)
    off = np.abs(change - np.longdouble(found.offset) * base)
    trial.require(
        bool((off <= slack).all()),
        f"of inputs that are all the base it does not make the base with the offset {found.offset}: "
        f"{_worst(off, slack)}",
    )


def _response(trial: Trial) -> Response:
    with trial.calling("statistics"):
        answers = gather(trial.method, trial.case)[0]
    with trial.calling("response"):
        return trial.method.response(trial.case.context, answers)


def _stand_in(case: Case, generator: np.random.Generator) -> Array:
    """Return values that stand in for a base, near to the first input."""
    first = case.values().inputs[0]
    return case.precision.round((first + 0.01 * generator.standard_normal(first.size)).astype(first.dtype))


def _nearer(case: Case, model: int, base: Array, share: float) -> Any:
    """Return an input of which a share of the delta is left."""
    values = case.values().inputs[model]
    if model == case.context.base or share == 1:
        return case.raws[model]
    return _raw(case, base if share == 0 else case.precision.round(base + (values - base) * values.dtype.type(share)))


def _raw(case: Case, values: Array) -> Any:
    raw = store(values, case.context.compute, case.context.compute)
    raw.flags.writeable = False
    return raw


def _deltas(case: Case, base: Array) -> _Exact:
    return np.stack([values.astype(np.longdouble) - base for values in case.values().inputs])


def _rounding(found: Response, deltas: _Exact, base: Array, trial: Trial) -> _Exact:
    """Return how far each element of the reference's result can be from the exact one."""
    sizes, weight = np.abs(deltas), np.abs(base.astype(np.longdouble))
    exact = np.array(found.largest, dtype=np.longdouble) @ sizes + abs(1 + found.offset) * weight
    last = unit_of_results(trial.result.dtype)
    if found.rounding is None:
        return np.asarray(_WITHOUT_ROUNDING * last * (exact + weight + sizes.sum(axis=0)), dtype=np.longdouble)
    noise = np.array(found.rounding.noise, dtype=np.longdouble) @ sizes + found.rounding.base_noise * weight
    noise = noise + found.rounding.floor
    return np.asarray(noise + last * (exact + noise) + smallest_change(trial.result.dtype), dtype=np.longdouble)


def _certainly_finite(found: Response, deltas: list[_Exact], base: Array, trial: Trial) -> bool:
    """Return whether no number on the way to the result can outgrow the compute dtype."""
    if found.rounding is None:
        return True
    peaks, limit = np.array(found.rounding.peaks, dtype=np.longdouble), largest_number(trial.case.context.compute)
    weight = np.abs(base.astype(np.longdouble)) * found.rounding.base_peak
    return all(bool((peaks @ np.abs(one) + weight < limit / 2).all()) for one in deltas)


def _worst(found: _Exact, allowed: _Exact) -> str:
    index = int(np.argmax(found - allowed))
    return f"{float(found[index]):.6g} instead of at most {float(allowed[index]):.6g} at element {index}"
