"""Checks of what a method asks to know of whole tensors."""

from typing import Any

import numpy as np

from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.precision import Array
from mergefs.kernels.sums import LaneSums
from mergefs.methods.contract import ElementSum, ElementSums, Method, Quantity, RawRun
from mergefs.testing.answers import AboutQuantity, terms_of
from mergefs.testing.cases import vary
from mergefs.testing.choices import Choices
from mergefs.testing.trial import Trial, for_each_trial


def check_statistics(method: Method[Any]) -> None:
    """What is asked for can be answered, is the same each time, and does not depend on where blocks end."""
    for_each_trial(method, _check_statistics)


def _check_statistics(trial: Trial, choices: Choices) -> None:
    wanted = trial.statistics()
    trial.require(wanted == trial.statistics(), "it asks for other statistics the second time")
    trial.require(
        not wanted or bool(trial.method.specification.needs.strip()),
        "it asks for statistics, and `needs` of its specification does not say which",
    )
    for statistic in wanted:
        if isinstance(statistic, Quantity):
            _check_terms(trial, statistic, choices)


def _check_terms(trial: Trial, statistic: AboutQuantity, choices: Choices) -> None:
    context = trial.case.context
    cut = context.row * choices.integer(0, context.size // context.row)
    with trial.calling(f"the quantity {statistic.name!r}"):
        whole = terms_of(statistic, trial.case)
        pieces = [terms_of(statistic, trial.case, *piece) for piece in ((0, cut), (cut, context.size))]
    trial.require(
        np.array_equal(np.concatenate(pieces, axis=-1), whole, equal_nan=True),
        f"the terms of the quantity {statistic.name!r} are others when a block ends after element {cut}",
    )
    if statistic.fused is not None and context.compute in FUSED_DTYPES:
        with trial.calling(f"the compiled quantity {statistic.name!r}"), np.errstate(all="ignore"):
            compiled = statistic.fused(trial.case.values(0, None, statistic.models), trial.case.precision)
        trial.require(
            np.array_equal(compiled, whole, equal_nan=True),
            f"the compiled terms of the quantity {statistic.name!r} differ from the plain ones",
        )
    if isinstance(statistic, ElementSum | ElementSums) and statistic.lanes is not None:
        _check_lanes(trial, statistic, np.atleast_2d(whole))


def _check_lanes(trial: Trial, statistic: ElementSum | ElementSums, terms: Array) -> None:
    case = trial.case
    if case.context.compute not in FUSED_DTYPES or statistic.lanes is None:
        return
    raws = tuple(case.raws[model] for model in statistic.models)
    with trial.calling(f"the sums of the quantity {statistic.name!r}"), np.errstate(all="ignore"):
        found = LaneSums(statistic.lanes(RawRun(raws, case.context.compute, 0)), case.context.size).finish()
        expected = LaneSums.begin(len(terms)).add(terms).finish()
    trial.require(
        np.array_equal(found, expected, equal_nan=True),
        f"the compiled sums of the quantity {statistic.name!r} differ from those of its terms",
    )


def check_statistic_keys(method: Method[Any]) -> None:
    """Two statistics that the catalog takes for the same, by name, models and arguments, are the same quantity."""
    for_each_trial(method, _check_keys, finite=True)


def _check_keys(trial: Trial, choices: Choices) -> None:
    other = Trial(trial.method, vary(trial.method, trial.case, choices))
    first, second = _quantities(trial), _quantities(other)
    for statistic, others in ((one, second[one]) for one in first if one in second):
        with trial.calling(f"the quantity {statistic.name!r}"):
            terms = terms_of(statistic, trial.case), terms_of(others, other.case)
        trial.require(
            np.array_equal(*terms, equal_nan=True),
            f"the quantity {statistic.name!r} of models {statistic.models} with arguments {statistic.arguments} is "
            f"another one for {other.case.describe()}; all that its terms depend on belongs into `arguments`",
        )


def _quantities(trial: Trial) -> dict[AboutQuantity, AboutQuantity]:
    """Return the quantities that a method asks about, by themselves: equal ones are the same for the catalog."""
    return {statistic: statistic for statistic in trial.statistics() if isinstance(statistic, Quantity)}
