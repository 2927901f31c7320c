"""The bytes of one block in every input of a merge, as far as they are bought."""

import threading
from itertools import groupby

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.engine.compute import change_dtype
from mergefs.engine.tally import Tally
from mergefs.errors import PlanError
from mergefs.kernels.precision import Raw
from mergefs.planner.levels import EQUAL, NOTHING, WHOLE, Selection
from mergefs.planner.plan import TensorPlan
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place, Role
from mergefs.sources.reader import SourceReader

Run = tuple[Raw, DType]
"""Bytes of a run of elements, and the dtype that they are in."""


class InputReader:
    """Reads the inputs of one plan's tensors. Safe to share between threads.

    Of two models that are computed in step one begins ``from_the_middle`` of their inputs: so each of them reads half
    of what they have in common, where otherwise one would wait for all that the other reads.
    """

    def __init__(self, reader: SourceReader, tally: Tally, from_the_middle: bool = False) -> None:
        self._reader = reader
        self._whole_reader = reader.of_whole_tensors()
        self._tally = tally
        self._from_the_middle = from_the_middle
        self._lock = threading.Lock()
        self._seen: dict[str, bytearray] = {}

    def inputs(self, tensor: TensorPlan, block: int, purpose: Purpose) -> tuple[Run, ...]:
        """Return a block of every input, each with its dtype; what is not bought is the base's.

        An input of which only parts are bought, or planes of its delta, comes in the compute dtype.
        """
        selection = tensor.selection
        if selection is None:
            return self._all_whole(tensor, block, purpose)
        levels = selection.levels[:, selection.cells_of(block)]
        base = tensor.context.base if tensor.context is not None else None
        instead: Run | None = None
        if base is not None:
            instead = (self.whole(tensor, base, block, purpose), tensor.places[base].dtype)
        elif (levels != WHOLE).any():
            instead = self.stand_in(tensor, block, purpose)
        found: list[Run] = []
        for index, place in enumerate(tensor.places):
            giver = int(selection.givers[index, block])
            if index == base and instead is not None:
                found.append(instead)
            elif giver != index:
                found.append(found[giver])
            elif (levels[index] == WHOLE).all():
                found.append((self.whole(tensor, index, block, purpose), place.dtype))
            elif instead is None:
                raise PlanError(f"tensor {tensor.name!r}: nothing stands in for blocks that are not bought")
            elif np.isin(levels[index], (NOTHING, EQUAL)).all():
                found.append(instead)
            else:
                counted = self._counted_as(tensor, index, block, purpose)
                with self._tally.charge(tensor, index):
                    assembled = self._assembled(tensor, selection, index, block, instead, counted)
                found.append((assembled, tensor.compute))
        return tuple(found)

    def _all_whole(self, tensor: TensorPlan, block: int, purpose: Purpose) -> tuple[Run, ...]:
        """Return a block of every input, where all are bought."""
        count = len(tensor.places)
        first = count // 2 if self._from_the_middle else 0
        raws = {index: self.whole(tensor, index, block, purpose) for index in (*range(first, count), *range(first))}
        return tuple((raws[index], place.dtype) for index, place in enumerate(tensor.places))

    def stand_in(self, tensor: TensorPlan, block: int, purpose: Purpose) -> Run:
        """Return the bytes that stand in for what is not bought."""
        if tensor.stand_in is None:
            raise PlanError(f"tensor {tensor.name!r}: nothing stands in for blocks that are not bought")
        with self._tally.charge(tensor, len(tensor.places)):
            return self.bytes_at(tensor.stand_in, tensor, block, purpose), tensor.stand_in.dtype

    def whole(self, tensor: TensorPlan, index: int, block: int, purpose: Purpose) -> Raw:
        """Return the bytes of a block of one input, on the account of its role."""
        counted = self._counted_as(tensor, index, block, purpose)
        with self._tally.charge(tensor, index):
            return self.bytes_at(tensor.places[index], tensor, block, counted)

    def bytes_at(self, place: Place, tensor: TensorPlan, block: int, purpose: Purpose) -> Raw:
        """Return the bytes of a block at one place."""
        start, stop = tensor.grid.bounds(block)
        reader = self._reader if tensor.selection is not None else self._whole_reader
        return place.read(reader, start, stop, purpose)

    def will_read(self, tensor: TensorPlan, start: int, stop: int) -> None:
        """Have the system hold the elements ``start`` to ``stop`` of every input that is read as a whole."""
        if tensor.selection is None:
            for place in tensor.places:
                place.will_read(self._reader, start, stop)

    def _assembled(
        self, tensor: TensorPlan, selection: Selection, index: int, block: int, instead: Run, purpose: Purpose
    ) -> Raw:
        """Return a block of an input, in the compute dtype, of cells of different levels."""
        place, compute = tensor.places[index], tensor.compute
        itemsize, first = compute.itemsize, selection.grid.bounds(block)[0]
        base = change_dtype(*instead, compute)
        result: Raw = base.copy()
        for level, cells in groupby(selection.cells_of(block), key=lambda cell: int(selection.levels[index, cell])):
            run = list(cells)
            start, stop = selection.cells.bounds(run[0])[0], selection.cells.bounds(run[-1])[1]
            cut = slice((start - first) * itemsize, (stop - first) * itemsize)
            if level == WHOLE:
                result[cut] = change_dtype(place.read(self._reader, start, stop, purpose), place.dtype, compute)
            elif level not in (NOTHING, EQUAL):
                coded = tensor.coded[index]
                if coded is None:
                    raise PlanError(f"tensor {tensor.name!r}: planes of an input without planes are planned")
                side_by_side = range(run[0], run[-1] + 1)
                result[cut] = coded.decode(self._reader, base[cut], side_by_side, level, purpose)
        return result

    def _counted_as(self, tensor: TensorPlan, index: int, block: int, purpose: Purpose) -> Purpose:
        """Return on whose account a block of one input is read: experts' bytes that are read again count apart."""
        if purpose is not Purpose.EXPERT or tensor.roles[index] is not Role.EXPERT:
            return purpose
        number = block * len(tensor.places) + index
        with self._lock:
            seen = self._seen.get(tensor.name)
            if seen is None:
                seen = self._seen[tensor.name] = bytearray(tensor.grid.count * len(tensor.places))
            again = seen[number]
            seen[number] = True
        return Purpose.EXPERT_AGAIN if again else Purpose.EXPERT
