"""Codes the delta of a tensor, cell by cell, on all CPUs that the process may use."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergefs.checkpoint.dtypes import DType
from mergefs.errors import NonFiniteError
from mergefs.kernels.precision import is_finite, load
from mergefs.kernels.trellis_books import BOOKS
from mergefs.planes.cell import CodedCell, encode_cell
from mergefs.planes.layout import cell_grid, group_size
from mergefs.processors import usable_processors
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.sources.reader import SourceReader

_PENDING_ELEMENTS: Final = 2**22
"""Of cells that are being coded: some for every CPU, and memory that is bounded."""


@dataclass(frozen=True, slots=True)
class DeltaTask:
    """A tensor of an expert and of its base, and how its delta is to be coded."""

    expert: Place
    base: Place
    compute: DType
    planes: int
    cells: int

    @property
    def grid(self) -> BlockGrid:
        """The cells."""
        return cell_grid(self.base.shape, self.cells)

    @property
    def group(self) -> int:
        """The elements of a group."""
        return group_size(self.base.shape)


@dataclass(frozen=True, slots=True, eq=False)
class CellErrors:
    """What is kept of all cells of a tensor beside their records: see ``PlanesRecord``."""

    coded: NDArray[np.uint32]
    left: NDArray[np.float32]
    digest: bytes


class TensorEncoder:
    """Codes one tensor: iterate over the records, then ask for the ``errors``."""

    def __init__(self, task: DeltaTask, reader: SourceReader, pool: ThreadPoolExecutor) -> None:
        self._task = task
        self._reader = reader
        self._pool = pool
        self._hasher = blake3(BOOKS.astype("<i2").tobytes())
        self._coded: list[int] = []
        self._left: list[tuple[float, ...]] = []

    def __iter__(self) -> Iterator[bytes]:
        """Yield the record of each cell. Raises NonFiniteError and the errors of reading."""
        pending: deque[tuple[int, Future[CodedCell]]] = deque()
        waiting = 0
        try:
            for size, future in self._started():
                pending.append((size, future))
                waiting += size
                while waiting > _PENDING_ELEMENTS and len(pending) > 1:
                    size, future = pending.popleft()
                    waiting -= size
                    yield self._finished(future)
            while pending:
                yield self._finished(pending.popleft()[1])
        finally:
            for _, future in pending:
                future.cancel()

    def _started(self) -> Iterator[tuple[int, "Future[CodedCell]"]]:
        """Read block by block, and yield the elements and the coming record of each cell."""
        task = self._task
        step = task.grid.step
        for start, stop in BlockGrid.of(task.base.shape):
            values = []
            for place in (task.expert, task.base):
                raw = place.read(self._reader, start, stop, Purpose.ANALYSIS)
                if not is_finite(raw, place.dtype):
                    raise NonFiniteError(
                        f"{place.describe()} holds NaN or infinity among the elements {start} to {stop - 1}, and its "
                        "delta cannot be coded; repair the checkpoint or leave the model out"
                    )
                values.append(load(raw, place.dtype, task.compute))
            expert, base = values
            for first in range(0, stop - start, step):
                cell = slice(first, first + step)
                future = self._pool.submit(encode_cell, expert[cell], base[cell], task.compute, task.group, task.planes)
                yield expert[cell].size, future

    def _finished(self, future: "Future[CodedCell]") -> bytes:
        """Note what is kept of a cell, and return its record."""
        cell = future.result()
        self._hasher.update(cell.record)
        self._coded.append(cell.coded)
        self._left.append(cell.left)
        return cell.record

    def errors(self) -> CellErrors:
        """Return what is to be kept of the cells, after all records."""
        task = self._task
        coded = np.array(self._coded, dtype="<u4")
        left = _rounded_up(np.array(self._left, dtype=np.float64).T, task.grid.step)
        for part in (coded, left):
            self._hasher.update(part.tobytes())
        about = f"{task.compute.name} {task.planes} {task.grid.size} {task.grid.step} {task.group}"
        self._hasher.update(about.encode())
        return CellErrors(coded, left, self._hasher.digest(length=16))


def encoding_pool() -> ThreadPoolExecutor:
    """Return a thread for each CPU that the process may use."""
    return ThreadPoolExecutor(usable_processors(), thread_name_prefix="mergefs-planes")


def _rounded_up(values: NDArray[np.float64], terms: int) -> NDArray[np.float32]:
    """Return float32 numbers that are not below sums of ``terms`` squares, of which float64 gave ``values``."""
    certain = values * (1.0 + (terms + 2) * 2.0**-52)
    with np.errstate(over="ignore"):
        nearest = certain.astype("<f4")
    return np.where(nearest < certain, np.nextafter(nearest, np.float32(np.inf)), nearest).astype("<f4")
