"""All-pairs coverage: a few rows in which every value of every factor meets every value of every other factor.

The rows are found greedily and always in the same order, those that cover most first, so that a run of the first rows
is a good sample of them all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

Factors = Mapping[str, Sequence[str]]
"""The values of each factor, by its name."""

Row = dict[str, str]
"""One value for each factor."""

Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two factors, in their order, with a value of each."""


@dataclass(frozen=True, slots=True)
class Covering:
    """Rows that cover all pairs but ``impossible`` ones, for each of which a refused row is given that holds it."""

    rows: tuple[Row, ...]
    impossible: Mapping[Pair, Row]


def pairs(factors: Factors) -> Iterator[Pair]:
    """Yield every pair of values of two factors."""
    for (first, its_values), (second, other_values) in combinations(factors.items(), 2):
        for value, other in product(its_values, other_values):
            yield (first, value), (second, other)


def pairs_of(row: Row) -> Iterator[Pair]:
    """Yield the pairs of values that a row holds."""
    yield from combinations(row.items(), 2)


def cover(factors: Factors, allowed: Callable[[Row], bool] = lambda row: True) -> Covering:
    """Return rows of values that ``allowed`` accepts, in which all pairs occur that occur in any row it accepts."""
    return _Search(factors, allowed).run()


@dataclass
class _Search:
    """Takes up the first pair that is not covered yet, and puts the values around it that cover most of the others."""

    factors: Factors
    allowed: Callable[[Row], bool]
    rows: list[Row] = field(default_factory=list)
    open: dict[Pair, None] = field(default_factory=dict)

    def run(self) -> Covering:
        self.open = dict.fromkeys(pairs(self.factors))
        impossible: dict[Pair, Row] = {}
        if len(self.factors) < 2:
            single = [{name: value} for name, values in self.factors.items() for value in values]
            return Covering(tuple(row for row in single if self.allowed(row)), {})
        while self.open:
            pair = next(iter(self.open))
            filled = self._filled(pair)
            row = self._allowed_near(filled, pair)
            if row is None:
                impossible[pair] = filled
                del self.open[pair]
                continue
            for covered in pairs_of(row):
                self.open.pop(covered, None)
            self.rows.append(row)
        return Covering(tuple(_by_what_they_add(self.rows)), impossible)

    def _filled(self, pair: Pair) -> Row:
        """Return a row that holds ``pair`` and covers as much as a greedy choice finds, factor by factor."""
        row = dict(pair)
        for name, values in self.factors.items():
            if name not in row:
                row[name] = max(values, key=lambda value: self._gain(row, name, value))
        return {name: row[name] for name in self.factors}

    def _gain(self, row: Row, name: str, value: str) -> tuple[int, int]:
        """Return how many open pairs a value would cover, and how seldom it was used; more of either is better."""
        places = list(self.factors)
        covered = sum(
            (
                ((other, taken), (name, value))
                if places.index(other) < places.index(name)
                else ((name, value), (other, taken))
            )
            in self.open
            for other, taken in row.items()
        )
        return covered, -sum(earlier[name] == value for earlier in self.rows)

    def _allowed_near(self, row: Row, pair: Pair) -> Row | None:
        """Return an allowed row that holds ``pair``, or None.

        That is ``row`` or one that differs from it in one other factor, or from the row of all first values. So what
        ``allowed`` refuses should follow from two values, and the first value of a factor be one that mostly goes.
        """
        plain = {name: values[0] for name, values in self.factors.items()} | dict(pair)
        others = [name for name in self.factors if name not in dict(pair)]
        for start in (row, plain):
            changed = [start | {name: value} for name in others for value in self.factors[name]]
            changed.sort(key=lambda candidate: -sum(found in self.open for found in pairs_of(candidate)))
            found = next((candidate for candidate in (start, *changed) if self.allowed(candidate)), None)
            if found is not None:
                return found
        return None


def _by_what_they_add(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield rows so that each one adds as many pairs as any of those after it would."""
    left = {number: set(pairs_of(row)) for number, row in enumerate(rows)}
    while left:
        best = max(left, key=lambda number: len(left[number]))
        added = left.pop(best)
        for others in left.values():
            others -= added
        yield rows[best]
