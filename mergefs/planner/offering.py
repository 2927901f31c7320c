"""Tensors as offers: what their statistics, their planes and the answers of their methods say in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.errors import BudgetError
from mergefs.methods.contract import Response
from mergefs.planner.allocation import Offer, correlations, together
from mergefs.planner.levels import NOTHING, WHOLE
from mergefs.planner.plan import TensorPlan
from mergefs.planner.responses import response_of
from mergefs.planner.stock import Stock, deltas_of, stock_of
from mergefs.planner.strategy import Strategy
from mergefs.sources.place import Role, block_sizes
from mergefs.statistics.blocks import BlockDeltas, known_norms
from mergefs.statistics.service import StatisticsService

_LARGEST_FACTOR: Final = 1e100
"""Recipes may have larger ones; with block norms, which are float32, squares of these stay finite."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What is offered together: the blocks of a tensor, or the inputs of it that are bought whole."""

    tensor: int
    divisible: bool


class TensorOffers(Sequence[Offer]):
    """The offers of many tensors, made when they are asked for, so that not all statistics are in memory at a time.

    A tensor has one for the inputs that are bought by blocks or cells of them, and one for those that are bought whole.
    Deltas of the ones and the others count as orthogonal.
    """

    def __init__(
        self, tensors: Sequence[TensorPlan], catalog: Catalog, statistics: StatisticsService, strategy: Strategy
    ) -> None:
        self._tensors = tensors
        self._catalog = catalog
        self._statistics = statistics
        # Where there are no planes at all, none need be looked for.
        self._strategy = strategy if catalog.counts()["planes"] else replace(strategy, planes=False)
        self._stocks: dict[int, Stock] = {}
        self._parts = [_Part(number, kind) for number, tensor in enumerate(tensors) for kind in _kinds(tensor)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Return one offer; BudgetError where a delta has no block statistics."""
        part = self._parts[index]
        tensor = self._tensors[part.tensor]
        deltas = deltas_of(tensor, self._catalog)
        missing = [
            place
            for place, role, known in zip(tensor.places, tensor.roles, deltas, strict=True)
            if role is Role.EXPERT and known is None
        ]
        if missing:
            raise BudgetError(f"{missing[0].describe()} has no block statistics; run `mergefs analyze` on the recipe")
        if part.tensor not in self._stocks:
            self._stocks[part.tensor] = stock_of(tensor, deltas, self._catalog, self._strategy)
        stock = self._stocks[part.tensor]
        response = response_of(tensor, self._statistics)
        if response is None or tensor.stand_in is None:
            raise ValueError("a tensor that is copied has no offer")
        norms = known_norms(tensor.stand_in, tensor.compute, self._catalog) if response.offset else None
        numbers = _Numbers(stock, deltas, response, norms, self._strategy)
        if not part.divisible:
            return numbers.as_a_whole()
        return together(numbers.by_cell()) if self._strategy.together else numbers.by_cell()

    def stock(self, tensor: int) -> Stock:
        """Return what may be bought of a tensor whose offers have been asked for."""
        return self._stocks[tensor]

    def bought(self, levels: Sequence[NDArray[np.uint8]]) -> dict[int, NDArray[np.uint8]]:
        """Return for each tensor with offers the levels of a selection (uint8 [n, c]) from those of its offers."""
        result: dict[int, NDArray[np.uint8]] = {}
        for part, chosen in zip(self._parts, levels, strict=True):
            stock = self._stocks[part.tensor]
            shape = (len(stock.experts), stock.cells.count)
            found = result.setdefault(part.tensor, np.full(shape, NOTHING, dtype=np.uint8))
            last = _levels(stock, part.divisible) - 1
            if part.divisible and self._strategy.together:
                chosen = np.where(stock.by_cell(stock.is_open & stock.divisible[:, np.newaxis]), chosen, 0)
            found |= np.where(chosen == last, WHOLE, chosen).astype(np.uint8)  # of other inputs than the other part's
        return result


def _kinds(tensor: TensorPlan) -> list[bool]:
    """Return which parts a tensor has: of divisible experts, and of others."""
    if tensor.context is None or tensor.stand_in is None:
        return []
    found = {place.divisible for place, role in zip(tensor.places, tensor.roles, strict=True) if role is Role.EXPERT}
    return sorted(found, reverse=True)


def _levels(stock: Stock, divisible: bool) -> int:
    """Return how many levels an offer has: nothing, planes, and whole."""
    return 2 + (max((coded.planes for coded in stock.coded if coded is not None), default=0) if divisible else 0)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The arrays of a tensor's offers. ``norms`` are squared norms of the base's blocks, where they are asked for."""

    stock: Stock
    deltas: Sequence[BlockDeltas | None]
    response: Response
    norms: NDArray[np.float32] | None
    strategy: Strategy

    def by_cell(self) -> Offer:
        """Return the offer of the inputs that are bought by cells."""
        stock = self.stock
        is_open = stock.is_open & stock.divisible[:, np.newaxis]
        prices, shares = self._levels()
        return Offer(
            factors=self._factors,
            spreads=self._spreads,
            energies=self._cell_energies(),
            correlations=self._correlations,
            givers=stock.givers,
            is_open=is_open,
            prices=prices,
            shares=shares,
            unbought=np.where(self._computed_anyway | ~is_open.any(axis=0), 0.0, self._beside),
            cells_per_block=stock.cells_per_block,
        )

    def as_a_whole(self) -> Offer:
        """Return the offer of the inputs that are bought whole: as one block, with the sum of all Gram matrices."""
        stock = self.stock
        is_open = stock.is_open & ~stock.divisible[:, np.newaxis]
        any_open: NDArray[np.bool_] = np.logical_or.reduce(is_open, axis=1)
        energies = np.where(is_open, self._energies, 0.0)
        lengths = np.sqrt(energies)
        gram = np.einsum("bij,ib,jb->ij", self._correlations.astype(np.float64), lengths, lengths)
        total = energies.sum(axis=1)
        products = np.sqrt(np.outer(total, total))
        cosines = np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)
        prices = np.array(
            [
                place.total_bytes_read(Role.EXPERT) if found else 0
                for place, found in zip(stock.tensor.places, any_open, strict=True)
            ],
            dtype=np.int64,
        )
        alone = not (stock.experts & stock.divisible).any()
        beside = np.where(self._computed_anyway | ~is_open.any(axis=0), 0.0, self._beside).sum() if alone else 0.0
        # A block of the tensor stands for its givers: they are the same in all that are open.
        first = is_open.argmax(axis=1)
        return Offer(
            factors=self._factors,
            spreads=self._spreads,
            energies=total[:, np.newaxis],
            correlations=cosines.astype(np.float32)[np.newaxis],
            givers=np.take_along_axis(stock.givers, first[:, np.newaxis], axis=1),
            is_open=any_open[:, np.newaxis],
            prices=np.stack([np.zeros_like(prices), prices], axis=-1)[:, np.newaxis],
            shares=np.repeat(np.array([[[1.0, 0.0]]], dtype=np.float32), len(prices), axis=0),
            unbought=np.array([beside]),
        )

    @property
    def _factors(self) -> NDArray[np.float64]:
        return np.clip(np.array(self.response.factors, dtype=np.float64), -_LARGEST_FACTOR, _LARGEST_FACTOR)

    @property
    def _spreads(self) -> NDArray[np.float64]:
        return np.minimum(np.array(self.response.spreads, dtype=np.float64), _LARGEST_FACTOR**2)

    @property
    def _energies(self) -> NDArray[np.float64]:
        """The squared norm of every delta in every block (float64 [n, b])."""
        blocks = self.stock.tensor.grid.count
        return np.stack(
            [np.zeros(blocks) if known is None else known.squared_norms.astype(np.float64) for known in self.deltas]
        )

    @property
    def _correlations(self) -> NDArray[np.float32]:
        """The cosines between deltas in every block (float32 [b, n, n])."""
        blocks, inputs = self.stock.tensor.grid.count, len(self.deltas)
        if not self.strategy.angles:
            return np.repeat(np.eye(inputs, dtype=np.float32)[np.newaxis], blocks, axis=0)
        size = next(known.sketches.shape[1] for known in self.deltas if known is not None)
        return correlations(
            [np.zeros((blocks, size), dtype=np.int8) if known is None else known.sketches for known in self.deltas]
        )

    @property
    def _computed_anyway(self) -> NDArray[np.bool_]:
        """For each block whether some input is read that costs nothing (bool [b])."""
        found: NDArray[np.bool_] = np.logical_or.reduce(self.stock.free & self.stock.experts[:, np.newaxis], axis=0)
        return found

    @property
    def _beside(self) -> NDArray[np.float64]:
        """What a block that is left to the base lacks beside deltas: the merge multiplies the base (float64 [b])."""
        if self.norms is None:
            return np.zeros(self.stock.tensor.grid.count)
        return min(abs(self.response.offset), _LARGEST_FACTOR) ** 2 * self.norms.astype(np.float64)

    def _cell_energies(self) -> NDArray[np.float64]:
        """Return the squared norm of every delta in every cell (float64 [n, c]).

        Without planes the cells of a block have it in proportion to their elements.
        """
        stock = self.stock
        if stock.cells_per_block == 1:
            return self._energies
        sizes, blocks = block_sizes(stock.cells), block_sizes(stock.tensor.grid)
        block = np.arange(stock.cells.count) // stock.cells_per_block
        energies: NDArray[np.float64] = self._energies[:, block] * (sizes / blocks[block])
        for model, coded in enumerate(stock.coded):
            if coded is not None:
                energies[model] = coded.energies
        return energies

    def _levels(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return what each level costs (int64 [n, c, l]), and what it leaves of the energy (float32 [n, c, l])."""
        stock, count = self.stock, _levels(self.stock, divisible=True)
        shape = (len(stock.experts), stock.cells.count, count)
        prices, shares = np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.float32)
        shares[:, :, -1] = 0
        for model in np.flatnonzero(stock.experts & stock.divisible):
            prices[model, :, -1] = stock.tensor.places[model].bytes_read(stock.cells, Role.EXPERT)
            coded = stock.coded[model]
            if coded is None:
                continue
            for level in range(min(self.strategy.fewest_planes, coded.planes), coded.planes + 1):
                prices[model, :, level] = coded.bytes_read(level)
                np.divide(coded.left[level], coded.energies, out=shares[model, :, level], where=coded.energies > 0)
        return prices, shares
