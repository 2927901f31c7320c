"""What may be bought of one tensor: which blocks are free, whose bytes are the same, and which planes there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import ContentRecord
from mergefs.planner.levels import EQUAL, NOTHING, WHOLE, Coded, Selection, own_bytes
from mergefs.planner.plan import TensorPlan
from mergefs.planner.strategy import WITHOUT_PLANES, Strategy
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.place import Place, Role, StoredTensor
from mergefs.statistics.blocks import HASH_BYTES, BlockDeltas, known_deltas
from mergefs.statistics.identity import local_key

if TYPE_CHECKING:
    from mergefs.planes.assumed import AssumedPlanes
    from mergefs.planes.coded import CodedDelta

    Planes: TypeAlias = CodedDelta | AssumedPlanes


@dataclass(frozen=True, slots=True, eq=False)
class Stock:
    """What the catalog knows about buying one tensor of n inputs and b blocks.

    ``equal`` (bool [n, b]) are blocks that are the base's, ``free`` (bool [n, b]) others that cost no expert anything,
    ``givers`` (int16 [n, b]) the inputs whose bytes are used, as in ``Selection``. Inputs that are not ``divisible``
    (bool [n]) are bought whole. ``coded`` has the planes of each input in cells of ``cell`` elements.
    """

    tensor: TensorPlan
    equal: NDArray[np.bool_]
    free: NDArray[np.bool_]
    givers: NDArray[np.int16]
    divisible: NDArray[np.bool_]
    experts: NDArray[np.bool_]
    coded: "tuple[Planes | None, ...]"
    cell: int

    @property
    def is_open(self) -> NDArray[np.bool_]:
        """For each input and block: whether there is something to buy (bool [n, b])."""
        return self.experts[:, np.newaxis] & ~self.equal & ~self.free

    @property
    def cells(self) -> BlockGrid:
        """The grid of the cells that levels are bought by."""
        return BlockGrid(self.tensor.grid.size, self.cell)

    @property
    def cells_per_block(self) -> int:
        """The number of cells in a whole block."""
        return self.tensor.grid.step // self.cell

    @property
    def saves(self) -> bool:
        """Whether any block need not be read although everything is bought."""
        return bool(self.equal.any() or (self.givers != own_bytes(*self.givers.shape)).any())

    def selection(self, bought: NDArray[np.uint8]) -> Selection:
        """Return the selection that buys these levels (uint8 [n, c], as in ``Selection``) and what costs nothing."""
        levels = np.where(self.by_cell(self.equal), EQUAL, np.where(self.by_cell(self.free), WHOLE, bought))
        levels[~self.experts] = WHOLE
        paid = (levels != NOTHING) & (levels != EQUAL) & self.experts[:, np.newaxis]
        first = np.arange(0, levels.shape[1], self.cells_per_block)
        computed = np.logical_or.reduceat(paid.any(axis=0), first) if first.size else np.zeros(0, dtype=np.bool_)
        return Selection(self.tensor.grid, self.cell, levels.astype(np.uint8), self.givers, computed)

    def everything(self) -> Selection:
        """Return the selection that reads all that differs from the base, and bytes that inputs share once."""
        levels = np.where(self.equal, EQUAL, WHOLE).astype(np.uint8)
        computed = np.ones(self.tensor.grid.count, dtype=np.bool_)
        return Selection.of_blocks(self.tensor.grid, levels, self.givers, computed)

    def planes_of(self, selection: Selection) -> tuple[Coded | None, ...]:
        """Return the planes that a selection needs: for each input those that it buys, or nothing at all.

        What is only assumed cannot be needed: there is nothing to read.
        """
        partly = ((selection.levels != NOTHING) & (selection.levels < EQUAL)).any(axis=1)
        if not partly.any():
            return ()
        from mergefs.planes.coded import CodedDelta

        real = (coded if isinstance(coded, CodedDelta) else None for coded in self.coded)
        return tuple(coded if some else None for coded, some in zip(real, partly, strict=True))

    def by_cell(self, blocks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return what holds for blocks for each of their cells."""
        return np.repeat(blocks, self.cells_per_block, axis=1)[:, : self.cells.count]


def deltas_of(tensor: TensorPlan, catalog: Catalog) -> tuple[BlockDeltas | None, ...]:
    """Return the block statistics of every expert of a tensor, None of the base and of what is not known."""
    return tuple(
        known_deltas(place, tensor.stand_in, tensor.compute, catalog)
        if role is Role.EXPERT and tensor.stand_in is not None
        else None
        for place, role in zip(tensor.places, tensor.roles, strict=True)
    )


def all_blocks_differ(tensor: TensorPlan, catalog: Catalog) -> bool:
    """Return whether hashes alone tell that every input has bytes of its own in every block.

    It is told quickly, for most tensors of most families: then nothing can be had for nothing, and what else is known
    of the blocks need not be looked at. False also where hashes are not known, or do not tell whether values differ.
    """
    places = list(tensor.places)
    if tensor.stand_in is not None and tensor.stand_in not in places:
        places.append(tensor.stand_in)
    if not all(isinstance(place, StoredTensor) and place.dtype == tensor.compute for place in places):
        return False
    contents = [catalog.content(local_key(place)) for place in places]
    hashes = [_words(known)[:, 0] for known in contents if known is not None]
    if len(hashes) < len(places):
        return False
    # The first word of a hash is enough to tell blocks apart; where two agree, all words are looked at.
    words = np.sort(np.stack(hashes), axis=0)
    return not (words[1:] == words[:-1]).any()


def _words(content: ContentRecord) -> NDArray[np.uint64]:
    """Return the hash of each block in four words."""
    return np.frombuffer(content.blocks, dtype=np.uint64).reshape(-1, HASH_BYTES // 8)


def stock_of(
    tensor: TensorPlan, deltas: Sequence[BlockDeltas | None], catalog: Catalog, strategy: Strategy = WITHOUT_PLANES
) -> Stock:
    """Return what may be bought of a tensor whose experts have these block statistics, as far as they are known."""
    shape = (len(tensor.places), tensor.grid.count)
    experts = np.array([role is Role.EXPERT for role in tensor.roles], dtype=np.bool_)
    divisible = np.array([place.divisible for place in tensor.places], dtype=np.bool_)
    equal, free = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    for model, known in enumerate(deltas):
        if not experts[model]:
            continue
        if known is not None:
            equal[model] = known.changed == 0
        costs = tensor.places[model].bytes_read(tensor.grid, Role.EXPERT)
        free[model] = (costs == 0 if divisible[model] else not costs.any()) & ~equal[model]
    coded: tuple[Planes | None, ...] = (None,) * shape[0]
    if strategy.assumed_planes:
        coded = tuple(
            _assumed(tensor, place, known, strategy) for place, known in zip(tensor.places, deltas, strict=True)
        )
    elif strategy.planes:
        coded = _coded(tensor, catalog)
    cell = min((each.grid.step for each in coded if each is not None), default=tensor.grid.step)
    return Stock(
        tensor=tensor,
        equal=equal,
        free=free,
        givers=_givers(tensor, experts[:, np.newaxis] & ~equal & ~free, divisible, catalog),
        divisible=divisible,
        experts=experts,
        coded=tuple(each if each is not None and each.grid.step == cell else None for each in coded),
        cell=cell,
    )


def _assumed(tensor: TensorPlan, place: Place, known: BlockDeltas | None, strategy: Strategy) -> "Planes | None":
    """Return what the planes of an input would be, None where it can have none."""
    from mergefs.planes.assumed import AssumedPlanes
    from mergefs.planes.coded import can_have_planes

    if known is None or not can_have_planes(place, tensor.stand_in):
        return None
    return AssumedPlanes.of(tensor.shape, known.squared_norms, strategy.assumed_planes)


def _coded(tensor: TensorPlan, catalog: Catalog) -> "tuple[CodedDelta | None, ...]":
    """Return the planes of every expert; none where some expert's tensor is not stored and so has no cells."""
    from mergefs.planes.coded import known_planes

    stand_in = tensor.stand_in
    if stand_in is None or not all(isinstance(place, StoredTensor) for place in tensor.places):
        return (None,) * len(tensor.places)
    return tuple(
        known_planes(place, stand_in, tensor.compute, catalog) if role is Role.EXPERT else None
        for place, role in zip(tensor.places, tensor.roles, strict=True)
    )


def _givers(
    tensor: TensorPlan, is_open: NDArray[np.bool_], divisible: NDArray[np.bool_], catalog: Catalog
) -> NDArray[np.int16]:
    """Return the input whose bytes each input has in each block: the first of those that have the same.

    Inputs that are bought whole must be the same as a whole.
    """
    givers = own_bytes(*is_open.shape)
    contents = [
        catalog.content(local_key(place)) if found.any() else None
        for place, found in zip(tensor.places, is_open, strict=True)
    ]
    hashes = [None if known is None else _words(known) for known in contents]
    for other in range(1, len(givers)):
        for one in range(other):
            mine, theirs = hashes[other], hashes[one]
            if mine is None or theirs is None or tensor.places[one].dtype != tensor.places[other].dtype:
                continue
            if not (mine[:, 0] == theirs[:, 0]).any():  # by far the most common
                continue
            same = (mine == theirs).all(axis=1)
            if divisible[one] != divisible[other] or not (divisible[one] or same.all()):
                continue
            same &= is_open[one] & is_open[other] & (givers[one] == one) & (givers[other] == other)
            givers[other][same] = one
    return givers
