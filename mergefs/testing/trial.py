"""A method under trial on one case: calls it, and turns what goes wrong into a ContractError."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.precision import Array, Precision, store
from mergefs.methods.contract import Method, Statistic
from mergefs.testing.answers import gather
from mergefs.testing.cases import Case, make_case
from mergefs.testing.choices import Choices, for_each_case

_CASES: Final = 50
_BITS: Final = {16: np.uint16, 32: np.uint32, 64: np.uint64}


class ContractError(AssertionError):
    """A method does not keep a promise that recipes, the planner or the engine rely on."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A method and the case that it is tried on."""

    method: Method[Any]
    case: Case

    @contextmanager
    def calling(self, what: str) -> Iterator[None]:
        """Turn whatever the method raises into a ContractError: the reader of a mapped file would die of it."""
        try:
            with np.errstate(all="ignore"):
                yield
        except Exception as error:
            raise self.violation(f"{what} raises {type(error).__name__}: {error}") from error

    def violation(self, what: str) -> ContractError:
        """Return the error that says what is wrong, and for which tensor."""
        return ContractError(f"{self.method.specification.name}: {what}; for {self.case.describe()}")

    def require(self, condition: bool, what: str) -> None:
        """Raise ContractError unless ``condition`` holds."""
        if not condition:
            raise self.violation(what)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return all that the method asks for."""
        with self.calling("statistics"):
            return gather(self.method, self.case)[1]

    def coefficients(self) -> Any:
        """Return the coefficients, from statistics that are gathered for it."""
        with self.calling("statistics"):
            answers = gather(self.method, self.case)[0]
        with self.calling("coefficients"):
            return self.method.coefficients(self.case.context, answers)

    def reference(self, coefficients: Any, start: int = 0, stop: int | None = None) -> Array:
        """Return what the reference makes of a run of elements."""
        with self.calling("reference"):
            return self.method.reference(self.case.values(start, stop), coefficients, self.case.precision)

    @property
    def result(self) -> Precision:
        """The precision of what the reference returns."""
        return Precision(self.method.result_dtype(self.case.context.compute))


def for_each_trial(method: Method[Any], body: Callable[[Trial, Choices], None], finite: bool = False) -> None:
    """Try a method on many cases, of any data or of finite numbers; ContractError when it refuses all of them."""

    def run(choices: Choices) -> None:
        body(Trial(method, make_case(method, choices, finite)), choices)

    if not for_each_case(run, _CASES):
        raise ContractError(f"{method.specification.name}: `check` refuses every case that its specification allows")


def same_bits(first: Array, second: Array, precision: Precision) -> bool:
    """Return whether two arrays hold the same values of ``precision`` bit by bit, any NaN standing for any other."""
    return bool(np.array_equal(_patterns(first, precision), _patterns(second, precision)))


def _patterns(values: Array, precision: Precision) -> NDArray[Any]:
    patterns: NDArray[Any] = store(values, precision.dtype, precision.dtype).view(_BITS[precision.dtype.bits]).copy()
    patterns[np.isnan(values)] = 0x7FFF
    return patterns
