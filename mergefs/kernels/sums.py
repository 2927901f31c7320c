"""Sums of many numbers, in orders that follow from their places alone.

Sums in float64 are taken in 128 lanes by turns, which keep the widest vectors of a CPU busy, and these are then added
in halves.

Sums in float32 are added up in the order that torch adds in on one thread: it adds a vector's elements up in 32 lanes
by turns, four vectors of eight. So that rounding errors do not grow with the number of turns, what some turns have come
to goes to another level, so many of these to the next, and so on. At the end come the levels, the vectors, the elements
that are left over, and the lanes, one after the other. With more threads torch cuts vectors of more than 32,768
elements into as many parts, so only this order is reproducible.

Sums across vectors that lie one after the other, one for each place in them, have levels, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Single = NDArray[np.float32]
Double = NDArray[np.float64]

AddToLanes: TypeAlias = Callable[[Double, NDArray[Any], int], None]
"""Adds a vector to its lanes, the first element to the one with this number."""

AddTurns: TypeAlias = Callable[[Single, Single, int, int], None]
"""Adds whole turns to the levels of a vector, from the power of two that a step is, and the turns before."""

LANES: Final = 128
"""Of sums in float64."""

_LANES: Final = 8
_VECTORS: Final = 4
TURN: Final = _VECTORS * _LANES
_LEVELS: Final = 4
_SHORTEST_STEP: Final = 4  # as a power of two


@dataclass(frozen=True, slots=True)
class LaneSums:
    """What has been added up in float64 of some vectors that are seen from the first element to the last.

    Element ``i`` of each is added to its lane ``i % 128``. ``lanes`` have a row for each vector, ``seen`` is how many
    elements of each there were.
    """

    lanes: Double
    seen: int

    @classmethod
    def begin(cls, vectors: int) -> "LaneSums":
        """Return the sums of nothing yet."""
        return cls(np.zeros((vectors, LANES)), 0)

    def add(self, values: NDArray[Any], compiled: AddToLanes | None = None) -> "LaneSums":
        """Return the sums with the next elements of each vector, a row of ``values``.

        ``compiled`` is a faster way to the same bits.
        """
        count, filled = values.shape[1], self.seen % LANES
        if compiled is not None:
            lanes = self.lanes.copy()
            for row, into in zip(values, lanes, strict=True):
                compiled(into, row, filled)
            return LaneSums(lanes, self.seen + count)
        whole = -(-(filled + count) // LANES)
        padded = np.zeros((len(values), whole * LANES))
        padded[:, filled : filled + count] = values
        turns = padded.reshape(len(values), whole, LANES)
        # Along any axis but the last numpy adds one after the other.
        lanes = np.add.reduce(np.concatenate((self.lanes[:, None], turns), axis=1), axis=1)
        return LaneSums(lanes, self.seen + count)

    def finish(self) -> Double:
        """Return the sums."""
        lanes = self.lanes
        while lanes.shape[1] > 1:
            lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
        return lanes[:, 0]


@dataclass(frozen=True, slots=True)
class _Levels:
    """What some turns have come to, arrays of one shape: a step of them on each level at most, all on the last.

    ``power`` is the power of two that the turns of a step are, and the steps of each level.
    """

    power: int
    turns: int
    totals: Single

    @classmethod
    def begin(cls, turns: int, *shape: int) -> "_Levels":
        """Return the sums of nothing yet, for so many turns."""
        power = max(_SHORTEST_STEP, (max(turns, 1) - 1).bit_length() // _LEVELS)
        return cls(power, 0, np.zeros((_LEVELS, *shape), dtype=np.float32))

    def add(self, terms: Single) -> "_Levels":
        """Return the sums with the next turns, which lie along the first axis of ``terms``."""
        totals, turns, first = self.totals.copy(), self.turns, 0
        step = 1 << self.power
        while first < len(terms):
            last = min(len(terms), first + step - turns % step)
            # Along any axis but the last numpy adds one after the other, if the last is longer than one.
            totals[0] = np.add.reduce(np.concatenate((totals[:1], terms[first:last])), axis=0)
            turns, first = turns + last - first, last
            if turns % step == 0:
                self._raise(totals, turns)
        return _Levels(self.power, turns, totals)

    def add_compiled(self, rows: Single, compiled: AddTurns) -> "_Levels":
        """Do the same with the turns of each vector one after the other in its row of ``rows``."""
        totals = np.moveaxis(self.totals, 1, 0).copy(order="C")
        for row, levels in zip(rows, totals, strict=True):
            compiled(levels, row, self.power, self.turns)
        return _Levels(self.power, self.turns + rows.shape[1] // TURN, np.moveaxis(totals, 1, 0))

    def _raise(self, totals: Single, turns: int) -> None:
        """Add each level to the next one, as far as it is full."""
        for level in range(1, _LEVELS):
            totals[level] += totals[level - 1]
            totals[level - 1] = 0
            if turns >> level * self.power & (1 << self.power) - 1:
                return

    def finish(self) -> Single:
        """Return the sums."""
        return _in_order(self.totals)


@dataclass(frozen=True, slots=True)
class PartialSums:
    """What has been added up of some vectors of ``size`` elements each, that are seen from the first to the last.

    ``levels`` has what the lanes of each vector have come to, ``left`` are elements that are too few for another turn.
    """

    size: int
    levels: _Levels
    left: Single

    @classmethod
    def begin(cls, vectors: int, size: int) -> "PartialSums":
        """Return the sums of nothing yet."""
        return cls(size, _Levels.begin(size // TURN, vectors, TURN), np.zeros((vectors, 0), dtype=np.float32))

    def add(self, values: Single, compiled: AddTurns | None = None) -> "PartialSums":
        """Return the sums with the next elements of each vector, a row of ``values``.

        ``compiled`` is a faster way to the same bits.
        """
        values = np.concatenate((self.left, values), axis=1) if self.left.size else values
        whole = values.shape[1] - values.shape[1] % TURN
        left = values[:, whole:].copy()
        if compiled is not None:
            return PartialSums(self.size, self.levels.add_compiled(values[:, :whole], compiled), left)
        turns = values[:, :whole].reshape(values.shape[0], whole // TURN, TURN)
        return PartialSums(self.size, self.levels.add(np.moveaxis(turns, 1, 0)), left)

    def finish(self) -> Single:
        """Return the sums."""
        # Vectors that are too short for a lane each are added up element by element.
        lanes = _LANES if self.size >= _LANES else 1
        vectors = np.moveaxis(self.levels.finish().reshape(len(self.left), _VECTORS, _LANES), 1, 0)[:, :, :lanes]
        whole = self.left.shape[1] - self.left.shape[1] % lanes
        left = np.moveaxis(self.left[:, :whole].reshape(len(self.left), whole // lanes, lanes), 1, 0)
        if lanes == 1 and whole >= _VECTORS:
            vectors, left = left[:_VECTORS], left[_VECTORS:]
        return _in_order(np.concatenate((self.left[:, whole:].T, _joined(vectors, left).T)))


def row_sums(rows: Single) -> Single:
    """Return the sum of each row of a matrix."""
    return PartialSums.begin(*rows.shape).add(rows).finish()


def sums_across(vectors: Single, start: int, size: int) -> Single:
    """Return the sum of each column of a matrix that has all vectors from their element ``start`` on.

    ``size`` is how many elements the vectors have, of which there are two or more: how torch adds depends on the place.
    """
    if vectors.shape[1] == 1:  # which numpy would add up in pairs
        return sums_across(np.repeat(vectors, 2, axis=1), start, size)[:1]
    together = TURN if size >= _LANES else _VECTORS
    plain = _Levels.begin(len(vectors), vectors.shape[1]).add(vectors).finish()
    whole = len(vectors) - len(vectors) % _VECTORS
    turns = vectors[:whole].reshape(whole // _VECTORS, _VECTORS, vectors.shape[1])
    by_turns = _Levels.begin(len(turns), *turns.shape[1:]).add(turns).finish()
    places = start + np.arange(vectors.shape[1])
    return np.where(places < size - size % together, plain, _joined(by_turns, vectors[whole:]))


def _joined(vectors: Single, left: Single) -> Single:
    """Return the sum of the four ``vectors`` that turns have come to, the first with those that are ``left`` over."""
    return _in_order(np.concatenate((_in_order(np.concatenate((vectors[:1], left)))[None], vectors[1:])))


def _in_order(terms: Single) -> Single:
    """Return the sum along the first axis, from the first to the last."""
    total: Single = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
