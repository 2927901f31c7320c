"""What may be bought of one tensor, what it costs, and what it is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """One tensor of n inputs, cut into b blocks of ``cells_per_block`` cells each (the last may have fewer), c in all.

    The cells of an input are bought at one of l levels, from 0, nothing, to l - 1, all of it. What is expected to be
    lost of a cell whose inputs are at levels that leave the shares u of their energies G is

        sum over i of (f_i^2 + s_i) u_i G_ii  +  sum over i != j of f_i f_j u_i u_j G_ij

    with factors f and spreads s: by how much the output follows an input's delta, and the variance of that over
    elements. Inputs with the same bytes in a block are one, with the sum of their factors and one price.

    - ``factors``, ``spreads``: float64 [n].
    - ``energies``: float64 [n, c], squared norms of the deltas.
    - ``correlations``: float32 [b, n, n], cosines of the angles between deltas.
    - ``givers``: int16 [n, b], the input whose bytes are used: itself, or an earlier one with the same bytes.
    - ``is_open``: bool [n, b], whether there is something to buy: neither the base's bytes nor free of charge.
      Inputs with the same bytes are alike in that.
    - ``prices``: int64 [n, c, l], bytes read at each level; 0 at level 0 and positive at the last one. A level that an
      input lacks has price 0 and leaves everything.
    - ``shares``: float32 [n, c, l], what a level leaves of the energy: 1 at level 0, 0 at the last one.
    - ``unbought``: float64 [b], squared error that a block has beside as long as nothing of it is bought.
    """

    factors: NDArray[np.float64]
    spreads: NDArray[np.float64]
    energies: NDArray[np.float64]
    correlations: NDArray[np.float32]
    givers: NDArray[np.int16]
    is_open: NDArray[np.bool_]
    prices: NDArray[np.int64]
    shares: NDArray[np.float32]
    unbought: NDArray[np.float64]
    cells_per_block: int = 1

    @property
    def levels(self) -> int:
        """The number of levels, with those for nothing and for all."""
        levels: int = self.prices.shape[2]
        return levels

    @property
    def for_sale(self) -> NDArray[np.bool_]:
        """Whether a cell of an input has a price of its own, bool [n, c]: it is open, and not another input's."""
        own = self.is_open & (self.givers == np.arange(len(self.givers))[:, np.newaxis])
        return np.repeat(own, self.cells_per_block, axis=1)[:, : self.energies.shape[1]]

    @property
    def price_of_all(self) -> int:
        """The bytes that buying everything takes."""
        return int(self.prices[:, :, -1][self.for_sale].sum())

    @property
    def everything(self) -> NDArray[np.uint8]:
        """The levels (uint8 [n, c]) at which all is bought that is open."""
        is_open = np.repeat(self.is_open, self.cells_per_block, axis=1)[:, : self.energies.shape[1]]
        return np.where(is_open, self.levels - 1, 0).astype(np.uint8)


def correlations(sketches: Sequence[NDArray[np.int8]]) -> NDArray[np.float32]:
    """Return the cosines (float32 [b, n, n]) between n inputs' deltas, from sketches (int8 [b, size] each) of b blocks.

    Sums are exact integers, so equal sketches have cosine 1; a sketch of zeros has 0 with all others. The cosine of two
    sketches differs from that of the deltas by a random error of variance ``(1 - cosine^2)^2 / size``. Choosing among
    many sets by it would choose errors, so the blocks of a tensor are drawn towards their mean by as much as that
    variance makes up of theirs (Efron and Morris, 1973): all of it where they do not differ by more than chance.
    """
    from mergefs.planner.allocation.compiled import COSINES

    stacked = np.ascontiguousarray(np.stack(sketches, axis=0))
    return np.asarray(COSINES.compiled()(stacked))


def together(offer: Offer) -> Offer:
    """Return the offer of all inputs as one, whose cells are bought at one level for every input that is open there.

    Its energy is that of what the inputs add up to in the output. What a level leaves of it is taken to be the mean of
    what it leaves of the inputs, weighted by what they contribute; a level that some of them lack is lacking.
    """
    n, cells = offer.energies.shape
    block = np.arange(cells) // offer.cells_per_block
    is_open = offer.is_open[:, block]
    own = offer.for_sale
    lengths = np.sqrt(np.where(is_open, offer.energies, 0.0)) * offer.factors[:, np.newaxis]
    cosines = offer.correlations[block].astype(np.float64)
    cosines[:, np.arange(n), np.arange(n)] = 1.0
    energies = np.einsum("ic,cij,jc->c", lengths, cosines, lengths)
    parts = np.where(is_open, offer.energies, 0.0) * (offer.factors**2 + offer.spreads)[:, np.newaxis]
    energies = np.maximum(energies, 0.0) + (parts - lengths**2).sum(axis=0)
    lacking = ((offer.prices[:, :, 1:-1] == 0) & own[:, :, np.newaxis]).any(axis=0)
    weights = parts / np.maximum(parts.sum(axis=0), np.finfo(np.float64).tiny)
    shares = np.einsum("ic,icl->cl", weights, offer.shares.astype(np.float64))
    prices = np.where(own[:, :, np.newaxis], offer.prices, 0).sum(axis=0)
    prices[:, 1:-1][lacking] = 0
    shares[:, 1:-1][lacking] = 1.0
    shares[:, 0], shares[:, -1] = 1.0, 0.0
    return Offer(
        factors=np.ones(1),
        spreads=np.zeros(1),
        energies=energies[np.newaxis],
        correlations=np.ones((offer.correlations.shape[0], 1, 1), dtype=np.float32),
        givers=np.zeros((1, offer.givers.shape[1]), dtype=np.int16),
        is_open=np.logical_or.reduce(offer.is_open, axis=0)[np.newaxis],
        prices=prices[np.newaxis],
        shares=shares.astype(np.float32)[np.newaxis],
        unbought=offer.unbought,
        cells_per_block=offer.cells_per_block,
    )
