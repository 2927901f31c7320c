"""What a budget buys: the steps of all cells in order of what they remove for each byte, under a hard cap."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mergefs.planner.allocation.chains import candidates_of, chains_of
from mergefs.planner.allocation.offers import Offer
from mergefs.planner.allocation.steps import AllSteps, Steps, sum_in_order


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """What is bought of each tensor: the level of every input in every cell (uint8 [n, c]).

    Levels of inputs that are not open are 0, those of inputs with the same bytes are the same. ``spent`` is in bytes;
    ``total`` is the expected squared error where nothing is bought, ``left`` what is expected to be left of it.
    ``complete`` says that everything is bought whole.
    """

    levels: tuple[NDArray[np.uint8], ...]
    spent: int
    total: float
    left: float
    complete: bool


def allocate(offers: Sequence[Offer], limit: int, spill: Path | None = None) -> Allocation:
    """Return what to buy for at most ``limit`` bytes so that the expected squared error is small.

    Each offer is asked for once, and again where little is left of the limit and one of its cells might still use it;
    so a sequence may make them when they are asked for. A larger limit never leaves a larger error: at every turn the
    step that is taken removes the most for a byte of all that fit, which bounds what a smaller rest could remove.
    Equal slopes go by the order of tensors and cells. The result does not depend on anything else.

    What there is to choose from is kept in files in the directory ``spill``, or in memory where none is given.
    """
    prices: list[int] = []
    steps = Steps(spill)
    everything: list[NDArray[np.uint8]] = []
    for offer in offers:
        steps.append(chains_of(offer))
        prices.append(offer.price_of_all)
        everything.append(offer.everything)
    every = steps.whole()
    total = sum_in_order(every.gains)
    every.release()
    if sum(prices) <= limit:
        return Allocation(tuple(everything), sum(prices), total, 0.0, complete=True)
    spending = _Spending(offers, every)
    spent = spending.spend(limit)
    return Allocation(tuple(spending.levels()), spent, total, spending.error_left(), complete=False)


@dataclass(slots=True)
class _Beside:
    """A cell that has left its hull, since its next step did not fit: its candidates, and the one that is bought."""

    costs: NDArray[np.int64]
    errors: NDArray[np.float64]
    states: NDArray[np.uint8]
    current: int

    def next(self, rest: int) -> tuple[float, int] | None:
        """Return slope and number of the candidate that removes most for each byte of those that fit."""
        prices = self.costs - self.costs[self.current]
        gains = self.errors[self.current] - self.errors
        fitting = np.flatnonzero((prices > 0) & (prices <= rest) & (gains > 0))
        if not fitting.size:
            return None
        slopes = gains[fitting] / prices[fitting]
        best = int(np.argmax(slopes))
        return float(slopes[best]), int(fitting[best])


class _Spending:
    """The steps of all tensors one after the other, and how far each cell has come."""

    def __init__(self, offers: Sequence[Offer], steps: AllSteps) -> None:
        self._offers = offers
        self._steps = steps
        self._taken = np.zeros(steps.starts.size - 1, dtype=np.int64)
        self._beside: dict[int, _Beside] = {}

    def spend(self, limit: int) -> int:
        """Take what is worth most for each byte while it fits, and return the bytes that are spent."""
        order = np.argsort(-self._steps.slopes, kind="stable")
        self._steps.release()
        spent = self._steps.costs[order]
        np.cumsum(spent, out=spent)
        fitting = int(np.searchsorted(spent, limit, side="right"))
        rest = limit - (int(spent[fitting - 1]) if fitting else 0)
        del spent
        self._steps.release()
        self._taken[:] = np.bincount(self._steps.cell[order[:fitting]], minlength=self._taken.size)
        return limit - self._fill(order, fitting, rest)

    def _fill(self, order: NDArray[np.int64], position: int, rest: int) -> int:
        """Use what is left, where steps no longer fit, for whatever still does; return the bytes that nothing uses."""
        from mergefs.planner.allocation.compiled import FILL, NOTHING_FITS

        fill = FILL.compiled()
        waiting: list[tuple[float, int, int]] = []  # what the cells that left their hulls could buy, the best first
        while True:
            until = -waiting[0][0] if waiting else -np.inf
            position, rest, chain = fill(
                order,
                position,
                self._steps.slopes,
                self._steps.costs,
                self._steps.least,
                self._steps.cell,
                self._steps.starts,
                self._taken,
                rest,
                until,
            )
            if chain != NOTHING_FITS:
                self._leave_hull(chain)
                self._await(chain, rest, waiting)
                continue
            if not waiting:
                return int(rest)
            slope, chain, candidate = heapq.heappop(waiting)
            beside = self._beside[chain]
            if beside.next(rest) == (-slope, candidate):
                rest -= int(beside.costs[candidate] - beside.costs[beside.current])
                beside.current = candidate
            self._await(chain, rest, waiting)

    def _leave_hull(self, chain: int) -> None:
        """Look at all candidates of a cell from now on."""
        tensor, cell = self._place(chain)
        costs, errors, states = candidates_of(self._offers[tensor], cell)
        taken = int(self._taken[chain])
        current = 0
        if taken:
            first = int(self._steps.starts[chain])
            state = self._steps.states(tensor)[first + taken - 1 - self._steps.first_step(tensor)]
            cost = self._steps.costs[first : first + taken].sum()
            same = np.flatnonzero((states == state).all(axis=1) & (costs == cost))
            current = int(same[0])
        self._beside[chain] = _Beside(costs, errors, states, current)

    def _await(self, chain: int, rest: int, waiting: list[tuple[float, int, int]]) -> None:
        """Put the best that a cell could still buy among what waits."""
        found = self._beside[chain].next(rest)
        if found is not None:
            heapq.heappush(waiting, (-found[0], chain, found[1]))

    def _place(self, chain: int) -> tuple[int, int]:
        """Return tensor and cell of a chain."""
        first_cells = self._steps.first_cells
        tensor = int(np.searchsorted(first_cells, chain, side="right")) - 1
        return tensor, chain - int(first_cells[tensor])

    def levels(self) -> list[NDArray[np.uint8]]:
        """Return the level of every input in every cell (uint8 [n, c]) of each tensor."""
        result: list[NDArray[np.uint8]] = []
        steps = self._steps
        for tensor in range(steps.tensors):
            first, behind = steps.first_cells[tensor], steps.first_cells[tensor + 1]
            taken, known = self._taken[first:behind], steps.states(tensor)
            states = np.zeros((taken.size, known.shape[1]), dtype=np.uint8)
            bought = taken > 0
            last = steps.starts[first:behind] - steps.first_step(tensor) + taken - 1
            states[bought] = known[last[bought]]
            result.append(states)
            self._steps.release()
        for chain, beside in self._beside.items():
            tensor, cell = self._place(chain)
            result[tensor][cell] = beside.states[beside.current]
        return [np.ascontiguousarray(states.T) for states in result]

    def error_left(self) -> float:
        """Return the expected squared error of all that is not bought."""
        starts, left = self._steps.starts, self._steps.gains.copy()
        left[np.arange(left.size, dtype=np.int64) < (starts[:-1] + self._taken)[self._steps.cell]] = 0.0
        for chain, beside in self._beside.items():
            left[starts[chain] : starts[chain + 1]] = 0.0
            left[starts[chain]] = beside.errors[beside.current] - beside.errors.min()
        return sum_in_order(left)
