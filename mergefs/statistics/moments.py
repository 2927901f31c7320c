"""What adds up norms and inner products block by block, in one compiled pass over the bytes of each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import F32
from mergefs.kernels.fused import FUSED_DTYPES
from mergefs.kernels.norms import LANES as NORM_LANES
from mergefs.kernels.norms import PartialNorm, stride
from mergefs.kernels.precision import Array, Raw
from mergefs.kernels.sums import LANES, TURN, LaneSums, PartialSums
from mergefs.methods.contract import Answer, ElementNorms, ElementSum, ElementSums, RawRun, SingleSums, Vector
from mergefs.statistics.gatherers import norms_of, sums_of
from mergefs.statistics.stream import StreamBlock, TensorStream


class BlockGatherer(Protocol):
    """Adds up one statistic, block by block."""

    def add(self, block: StreamBlock) -> None:
        """Add the next block."""

    def answer(self) -> Answer:
        """Return the answer, after all blocks."""


def moments_of(statistic: Any, stream: TensorStream) -> BlockGatherer | None:
    """Return what gathers a statistic from bytes, or None where its terms have to be computed first.

    Runs are added up from where they begin, so blocks and chunks must be whole turns.
    """
    if stream.compute not in FUSED_DTYPES:
        return None
    if isinstance(statistic, ElementSum | ElementSums) and statistic.lanes is not None:
        return _LaneSums(statistic, stream, statistic.lanes)
    chunk = getattr(statistic, "chunk", None) or TURN
    grid = stream.grid
    if (grid.count > 1 and grid.step % TURN) or chunk % TURN:
        return None
    if not isinstance(statistic, ElementNorms | ElementSum | ElementSums | SingleSums) or statistic.moments is None:
        return None
    if isinstance(statistic, ElementNorms):
        return _Norms(statistic, stream)
    return _SingleSums(statistic, stream) if isinstance(statistic, SingleSums) else _Sums(statistic, stream)


class _Pass:
    """The compiled pass for one statistic."""

    def __init__(self, statistic: ElementNorms | ElementSum | ElementSums | SingleSums, stream: TensorStream) -> None:
        from mergefs.kernels.fused.moments import Moments

        if statistic.moments is None:
            raise ValueError(f"{statistic.name} has no moments")
        self.statistic = statistic
        self.exact = statistic.moments.exact
        self.inputs = len(statistic.models) - statistic.moments.based
        self.pairs = len(statistic.moments.pairs)
        self._itemsize = stream.compute.itemsize
        self.compiled = Moments(
            stream.compute,
            statistic.moments.based,
            np.array(statistic.moments.lengths, dtype=np.float32),
            np.array(statistic.moments.pairs, dtype=np.int64).reshape(-1, 2),
        )

    def raws(self, block: StreamBlock, first: int, last: int) -> list[Raw]:
        """Return the bytes of the elements ``first`` to ``last`` of a block of each input."""
        size = self._itemsize
        return [block.in_compute_dtype(model)[first * size : last * size] for model in self.statistic.models]

    def left(self, block: StreamBlock, first: int, last: int) -> Array:
        """Return the terms of the last elements of a tensor, which are too few for a turn."""
        return block.terms([self.statistic], block.start + first, block.start + last)[0].astype(np.float32, copy=False)


class _Norms:
    """Carries the lanes of norms from block to block, chunk by chunk where there are chunks."""

    def __init__(self, statistic: ElementNorms, stream: TensorStream) -> None:
        self._pass = _Pass(statistic, stream)
        self._stride = stride(F32 if statistic.widened else stream.compute)
        self._chunk = statistic.chunk
        self._filled = 0
        self._lanes: NDArray[np.float32] = np.zeros((self._pass.inputs, NORM_LANES), dtype=np.float32)
        self._left: Array = np.zeros((self._pass.inputs, 0), dtype=np.float32)
        self._finished: list[list[np.float32]] = []

    def add(self, block: StreamBlock) -> None:
        """Add a block, piece by piece where it reaches into other chunks."""
        size, first = block.stop - block.start, 0
        while first < size:
            last = size if self._chunk is None else min(size, first + self._chunk - self._filled)
            whole = last - (last - first) % self._stride
            self._pass.compiled.add_squares(self._pass.raws(block, first, whole), self._lanes)
            if whole < last:
                self._left = self._pass.left(block, whole, last)
            self._filled += last - first
            if self._filled == self._chunk:
                self._finish_chunk()
            first = last

    def _finish_chunk(self) -> None:
        norms = [PartialNorm(lanes, left).finish() for lanes, left in zip(self._lanes, self._left, strict=True)]
        self._finished.append(norms)
        self._lanes[:], self._left, self._filled = 0, self._left[:, :0], 0

    def answer(self) -> Vector:
        """Return the norms."""
        if self._filled or not self._finished:
            self._finish_chunk()
        return norms_of(np.array(self._finished, dtype=np.float32).T, self._chunk is not None)


class _Sums:
    """Sums the products of each block in lanes, then the blocks."""

    def __init__(self, statistic: ElementSum | ElementSums, stream: TensorStream) -> None:
        self._pass = _Pass(statistic, stream)
        self._single = isinstance(statistic, ElementSum)
        self._parts: list[Vector] = []

    def add(self, block: StreamBlock) -> None:
        """Add a block."""
        lanes = np.zeros((self._pass.pairs, LANES), dtype=np.float64)
        size = block.stop - block.start
        self._pass.compiled.add_products(self._pass.raws(block, 0, size), self._pass.exact, lanes)
        self._parts.append(LaneSums(lanes, size).finish())

    def answer(self) -> Answer:
        """Return the sum, or the sums."""
        sums = sums_of(self._parts, self._pass.pairs)
        return float(sums[0]) if self._single else sums


class _LaneSums:
    """Sums what a method adds up of each block itself, then the blocks."""

    def __init__(
        self, statistic: ElementSum | ElementSums, stream: TensorStream, lanes: Callable[[RawRun], Vector]
    ) -> None:
        self._statistic = statistic
        self._compute = stream.compute
        self._lanes = lanes
        self._parts: list[Vector] = []

    def add(self, block: StreamBlock) -> None:
        """Add a block."""
        raws = tuple(block.in_compute_dtype(model) for model in self._statistic.models)
        with np.errstate(all="ignore"):
            lanes = self._lanes(RawRun(raws, self._compute, block.start))
            self._parts.append(LaneSums(lanes, block.stop - block.start).finish())

    def answer(self) -> Answer:
        """Return the sum, or the sums."""
        if isinstance(self._statistic, ElementSum):
            return float(sums_of(self._parts, 1)[0])
        return sums_of(self._parts, self._statistic.count)


class _SingleSums:
    """Carries the levels of float32 sums of products from block to block."""

    def __init__(self, statistic: SingleSums, stream: TensorStream) -> None:
        self._pass = _Pass(statistic, stream)
        self._begun = PartialSums.begin(self._pass.pairs, stream.size)
        self._totals = np.moveaxis(self._begun.levels.totals, 1, 0).copy(order="C")
        self._turns = 0
        self._left = self._begun.left

    def add(self, block: StreamBlock) -> None:
        """Add a block."""
        size = block.stop - block.start
        whole = size - size % TURN
        raws = self._pass.raws(block, 0, whole)
        self._pass.compiled.add_turns(raws, self._totals, self._begun.levels.power, self._turns)
        self._turns += whole // TURN
        if whole < size:
            self._left = self._pass.left(block, whole, size)

    def answer(self) -> Vector:
        """Return the sums."""
        levels = replace(self._begun.levels, turns=self._turns, totals=np.moveaxis(self._totals, 1, 0))
        return replace(self._begun, levels=levels, left=self._left).finish().astype(np.float64)
