"""Checks of the arithmetic: the reference on its own, any range of it, and the fused kernel against it."""

from itertools import pairwise
from typing import Any, Final

import numpy as np

from mergefs.engine.compute import run_kernel
from mergefs.kernels.precision import Precision, Raw, load
from mergefs.methods.contract import Method
from mergefs.testing.choices import Choices
from mergefs.testing.trial import Trial, for_each_trial, same_bits

_UNTOUCHED: Final = 0xA5


def check_results(method: Method[Any]) -> None:
    """The reference gives a value of the result's dtype for each element, of any data, and changes no input."""
    for_each_trial(method, _check_results)


def _check_results(trial: Trial, choices: Choices) -> None:
    values, result, size = trial.reference(trial.coefficients()), trial.result, trial.case.context.size
    shape = getattr(values, "shape", type(values).__name__)
    trial.require(shape == (size,), f"the reference returns {shape} for {size} elements")
    trial.require(
        values.dtype == result.carrier,
        f"the reference returns {values.dtype}, but {result.dtype.name} is carried in {np.dtype(result.carrier)}",
    )
    with np.errstate(all="ignore"):
        exact = (result.round(values) == values) | np.isnan(values)
    trial.require(
        bool(exact.all()),
        f"the reference returns values that {result.dtype.name} does not have; end it with `precision.round`",
    )
    again = trial.reference(trial.coefficients())
    trial.require(same_bits(values, again, result), "the same merge gives other values the second time")
    with trial.calling("taken_as_it_is"):
        taken = trial.method.taken_as_it_is(trial.case.context)
    if taken is not None:
        compute = trial.case.context.compute
        trial.require(0 <= taken < len(trial.case.raws), f"it takes input {taken}, which is none, as it is")
        trial.require(
            result.dtype == compute and same_bits(values, load(trial.case.raws[taken], compute, compute), result),
            f"it says that it takes input {taken} as it is, but the reference returns something else",
        )


def check_ranges(method: Method[Any]) -> None:
    """Any range, cut at multiples of ``grain``, is the same part of the whole, however the rest is cut."""
    for_each_trial(method, _check_ranges)


def _check_ranges(trial: Trial, choices: Choices) -> None:
    coefficients, size = trial.coefficients(), trial.case.context.size
    grain = _grain(trial, coefficients)
    whole = trial.reference(coefficients)
    bounds = [0, *sorted(grain * choices.integer(0, size // grain) for _ in range(3)), size]
    pieces = [trial.reference(coefficients, start, stop) for start, stop in pairwise(bounds)]
    trial.require(
        same_bits(np.concatenate(pieces), whole, trial.result),
        f"the ranges between {bounds} differ from the same parts of the whole tensor; the reference may look at no "
        f"elements but its own (grain is {grain}) and must count them from `block.start`",
    )


def check_fused(method: Method[Any]) -> None:
    """The fused kernel, where there is one, equals the reference bit for bit, wherever a run begins or lies."""
    for_each_trial(method, _check_fused)


def _check_fused(trial: Trial, choices: Choices) -> None:
    method, compute, size = trial.method, trial.case.context.compute, trial.case.context.size
    coefficients = trial.coefficients()
    grain = _grain(trial, coefficients)
    start = grain * choices.integer(0, size // grain)
    # Blocks come from files and from a cache: at odd addresses, and not to be written to.
    inputs = tuple((_moved(raw[start * compute.itemsize :], choices.integer(0, 3)), compute) for raw in trial.case.raws)
    with trial.calling("reference"):
        expected = run_kernel(method, coefficients, inputs, compute, compute, start, fused=False)
    before = [raw.tobytes() for raw, _ in inputs]
    with trial.calling("fused"):
        merged = run_kernel(method, coefficients, inputs, compute, compute, start)
        # Into the middle of memory that others write to, too.
        margin = choices.integer(0, 8)
        memory: Raw = np.full(expected.size + 2 * margin, _UNTOUCHED, dtype=np.uint8)
        into = memory[margin : margin + expected.size]
        again = run_kernel(method, coefficients, inputs, compute, compute, start, into=into)
    around = np.concatenate([memory[:margin], memory[margin + expected.size :]])
    trial.require(bool((around == _UNTOUCHED).all()), "the fused kernel writes beyond the memory for its result")
    trial.require([raw.tobytes() for raw, _ in inputs] == before, "the fused kernel changes its inputs")
    trial.require(
        merged.size == expected.size, f"the fused kernel returns {merged.size} bytes instead of {expected.size}"
    )
    trial.require(again.size == merged.size, f"the fused kernel returns {again.size} bytes where it is given memory")
    found, wanted, there = (load(raw, compute, compute) for raw in (merged, expected, again))
    trial.require(
        same_bits(found, wanted, Precision(compute)),
        f"the fused kernel differs from the reference among the elements from {start} on",
    )
    trial.require(same_bits(there, wanted, Precision(compute)), "the fused kernel differs where it is given memory")


def _grain(trial: Trial, coefficients: Any) -> int:
    """Return how many elements a kernel must see at once, which rows must consist of."""
    with trial.calling("grain"):
        grain = trial.method.grain(coefficients)
    row = trial.case.context.row
    trial.require(grain >= 1 and row % grain == 0, f"rows of {row} elements do not consist of a grain of {grain}")
    return grain


def _moved(raw: Raw, offset: int) -> Raw:
    """Return the same bytes ``offset`` beyond an aligned address, and read-only."""
    moved: Raw = np.empty(raw.size + offset, dtype=np.uint8)[offset:]
    moved[:] = raw
    moved.flags.writeable = False
    return moved
