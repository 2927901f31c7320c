"""Where the cases of the checks come from: hypothesis, which shrinks a failing one, or a seeded generator."""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NoReturn, Protocol, TypeVar

T = TypeVar("T")

_ATTEMPTS: Final = 50
"""So many cases are tried for each that is not rejected."""


class Choices(Protocol):
    """Makes the choices that a case consists of."""

    def integer(self, low: int, high: int) -> int:
        """Return an integer between both, inclusive."""

    def number(self, low: float, high: float) -> float:
        """Return a number between both, inclusive."""

    def pick(self, options: Sequence[T]) -> T:
        """Return one of ``options``."""

    def reject(self) -> NoReturn:
        """Give up on this case, because no recipe leads to it."""


class RejectedError(Exception):
    """The case is none that a method must be able to do."""


class _SeededChoices:
    """Choices of Python's own generator."""

    def __init__(self, seed: int) -> None:
        self._generator = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """Draw an integer."""
        return self._generator.randint(low, high)

    def number(self, low: float, high: float) -> float:
        """Draw a number."""
        return self._generator.uniform(low, high)

    def pick(self, options: Sequence[T]) -> T:
        """Draw one of ``options``."""
        return self._generator.choice(options)

    def reject(self) -> NoReturn:
        """Let the loop go on with the next case."""
        raise RejectedError


def for_each_case(body: Callable[[Choices], None], count: int) -> int:
    """Call ``body`` with the choices of ``count`` cases, the same each time; return how many were not rejected.

    Whatever ``body`` raises ends the loop. With hypothesis installed, which makes a failing case as small as it can be,
    it has as many tries before.
    """
    done = 0

    def counted(choices: Choices) -> None:
        nonlocal done
        body(choices)
        done += 1

    with suppress(ImportError):
        import hypothesis  # noqa: F401

        _for_each_example(counted, count)
    _for_each_seed(counted, count)
    return done


def _for_each_seed(body: Callable[[Choices], None], count: int) -> None:
    left = count
    for seed in range(_ATTEMPTS * count):
        with suppress(RejectedError):
            body(_SeededChoices(seed))
            left -= 1
        if not left:
            return


def _for_each_example(body: Callable[[Choices], None], count: int) -> None:
    from hypothesis import HealthCheck, Phase, assume, given, settings
    from hypothesis import strategies as st
    from hypothesis.errors import Unsatisfiable

    class Drawn:
        """Choices that hypothesis makes."""

        def __init__(self, data: st.DataObject) -> None:
            self._data = data

        def integer(self, low: int, high: int) -> int:
            """Draw an integer."""
            return self._data.draw(st.integers(low, high))

        def number(self, low: float, high: float) -> float:
            """Draw a number."""
            return self._data.draw(st.floats(low, high))

        def pick(self, options: Sequence[T]) -> T:
            """Draw one of ``options``."""
            return self._data.draw(st.sampled_from(options))

        def reject(self) -> NoReturn:
            """Let hypothesis draw another case."""
            assume(False)
            raise RejectedError

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        body(Drawn(data))

    with suppress(Unsatisfiable):
        run()
