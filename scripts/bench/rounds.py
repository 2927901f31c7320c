"""Runs the ways of a row by turns, so that what else the machine does meets all of them alike."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.processes import Taken
from bench.results import Checked, Results


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do what a row is about.

    ``run`` makes ready, which is not counted, runs and returns what that took. ``output`` is what it leaves for the
    check of the row; it is removed before each run.
    """

    name: str
    run: Callable[[], Taken]
    output: Path | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Ways that are compared with each other; ``ways`` makes what they need, ``check`` compares what they wrote.

    The check is made after the first round, and where it finds a difference nothing further is measured.
    """

    name: str
    ways: Callable[[], tuple[Way, ...]]
    check: Callable[[], Checked] | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How often each way is measured: ``repeat`` times, but no more once it has taken ``seconds`` in all."""

    repeat: int
    seconds: float

    def wants(self, found: list[Taken]) -> bool:
        """Return whether another run is wanted."""
        return not found or (len(found) < self.repeat and sum(taken.seconds for taken in found) < self.seconds)


def run_row(row: Row, results: Results, patience: Patience, say: Callable[[str], None]) -> bool:
    """Measure what is missing of a row; return whether its outputs are the same."""
    if _is_done(row, results, patience):
        return _same(row, results)
    ways = row.ways()
    try:
        for turn in range(patience.repeat):
            # By turns also which comes first: what one leaves behind in caches does not always meet the same other.
            for way in ways if turn % 2 == 0 else reversed(ways):
                found = results.taken(row.name, way.name)
                if len(found) == turn and patience.wants(found):
                    _measure(row, way, results, say)
            if not _checked(row, ways, results, say):
                return False
        results.keep_done(row.name, patience.repeat)
        return True
    finally:
        for way in ways:
            _remove(way.output)


def _is_done(row: Row, results: Results, patience: Patience) -> bool:
    """Return whether there is nothing left to measure of a row, without making what its ways need."""
    checked = results.checked(row.name)
    return results.rounds(row.name) >= patience.repeat or (checked is not None and not checked.same)


def _same(row: Row, results: Results) -> bool:
    checked = results.checked(row.name)
    return row.check is None or (checked is not None and checked.same)


def _measure(row: Row, way: Way, results: Results, say: Callable[[str], None]) -> None:
    """Run a way and keep what it took."""
    taken = _run(way)
    results.keep(row.name, way.name, taken)
    say(f"{row.name}: {way.name}: {taken.seconds:.2f} s")


def _run(way: Way) -> Taken:
    """Run a way on a quiet disk."""
    _remove(way.output)
    os.sync()
    return way.run()


def _remove(output: Path | None) -> None:
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)


def _checked(row: Row, ways: tuple[Way, ...], results: Results, say: Callable[[str], None]) -> bool:
    """Compare what the ways wrote, unless that is done; what an interrupted run has removed is written again."""
    if row.check is not None and results.checked(row.name) is None:
        for way in ways:
            if way.output is not None and not way.output.exists():
                _run(way)
        started = time.perf_counter()
        checked = row.check()
        results.keep_check(row.name, checked)
        say(f"{row.name}: {checked.found} ({time.perf_counter() - started:.0f} s to compare)")
    return _same(row, results)
