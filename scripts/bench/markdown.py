"""Tables and figures of time, memory and rates as they stand on the page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.processes import Taken
from mergefs.units import format_size


@dataclass(frozen=True, slots=True)
class Target:
    """What is aimed at, what was measured, and whether that is enough; None where it was not measured."""

    claim: str
    measured: str
    met: bool | None


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a table whose first ``words`` columns are text, and all others numbers."""
    lines = [columns, ["---"] * words + ["---:"] * (len(columns) - words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def seconds(value: float | None) -> str:
    """Return seconds with three digits, and ``-`` for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def median_of(taken: Sequence[Taken], value: float | None) -> str:
    """Return a median in seconds, with how many runs it is of."""
    return f"{seconds(value)} ({len(taken)})" if taken else "-"


def times(value: float | None) -> str:
    """Return how many times as fast or as long."""
    return (
        "-" if value is None else f"{value:.0f}x" if value >= 20 else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"
    )


def memory(value: int) -> str:
    """Return an amount of memory, and ``-`` for none."""
    return format_size(value) if value else "-"


def rate(nbytes: float, taken: float | None) -> str:
    """Return bytes for each second, in GB/s."""
    return "-" if not taken else f"{nbytes / taken / 1e9:.2f}"


def ratio(dividend: float | None, divisor: float | None) -> float | None:
    """Return a quotient, None where a part of it was not measured or is nothing."""
    return None if dividend is None or not divisor or divisor <= 0 or dividend <= 0 else dividend / divisor


def at_least(claim: str, value: float | None, limit: float) -> Target:
    """Return the target of a ratio that is to reach a limit."""
    return Target(claim, times(value), None if value is None else value >= limit)


def at_most(claim: str, value: float | None, limit: float) -> Target:
    """Return the target of a ratio that is not to exceed a limit."""
    return Target(claim, times(value), None if value is None else value <= limit)
