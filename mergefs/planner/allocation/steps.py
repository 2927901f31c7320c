"""The steps of all cells of all tensors, one after the other, in memory or in a file."""

import mmap
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from mergefs.planner.allocation.chains import Chains

BYTES_OF_A_STEP: Final = 96
"""What choosing takes in memory for each step: columns, with the levels of a dozen inputs, their order, and sums."""

_CHUNK: Final = 2**20


class _Column:
    """Numbers of one kind, appended in pieces. With a ``directory`` they lie in a file there that has no name."""

    def __init__(self, kind: type[np.generic], directory: Path | None) -> None:
        self._kind = kind
        self._held = bytearray()
        # Closed by whole(), and by whoever forgets this: a file without a name leaves nothing behind.
        self._mapped: mmap.mmap | None = None
        self._file: IO[bytes] | None = None if directory is None else tempfile.TemporaryFile(dir=directory)  # noqa: SIM115

    def append(self, numbers: NDArray[Any]) -> None:
        """Add numbers behind those that are there."""
        if self._file is None:
            self._held += numbers.tobytes()
        else:
            self._file.write(numbers.tobytes())

    def whole(self) -> NDArray[Any]:
        """Return all numbers, which cannot be written to; nothing may be appended afterwards."""
        if self._file is None:
            found = np.frombuffer(self._held, dtype=self._kind)
        else:
            with self._file as file:
                file.flush()
                if file.tell():
                    self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                found = np.frombuffer(self._mapped or b"", dtype=self._kind)
        found.flags.writeable = False
        return found

    def release(self) -> None:
        """Take the pages of the file that have been read out of the memory of the process; they can be read again."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)


class Steps:
    """Collects the chains of tensor after tensor. ``spill`` is a directory for what memory is not to hold."""

    def __init__(self, spill: Path | None = None) -> None:
        self._slopes, self._gains = _Column(np.float64, spill), _Column(np.float64, spill)
        self._costs, self._least = _Column(np.int64, spill), _Column(np.int64, spill)
        self._states = _Column(np.uint8, spill)
        self._lengths: list[NDArray[np.int64]] = []
        self._inputs: list[int] = []

    def append(self, part: Chains) -> None:
        """Add the steps of the cells of one more tensor."""
        self._slopes.append(part.slopes)
        self._gains.append(part.gains)
        self._costs.append(part.costs)
        self._least.append(part.least)
        self._states.append(part.states)
        self._lengths.append(np.diff(part.starts))
        self._inputs.append(part.states.shape[1])

    def whole(self) -> "AllSteps":
        """Return the steps of all tensors; none may be appended afterwards."""
        return AllSteps(
            self._slopes.whole(),
            self._gains.whole(),
            self._costs.whole(),
            self._least.whole(),
            self._states.whole(),
            self._lengths,
            self._inputs,
            self._release,
        )

    def _release(self) -> None:
        for column in (self._slopes, self._gains, self._costs, self._least, self._states):
            column.release()


class AllSteps:
    """The steps of all tensors. Cells are numbered over all tensors, steps over all cells.

    - ``slopes``, ``gains``: float64 [steps]; ``costs``, ``least``: int64 [steps]: as in ``Chains``.
    - ``starts``: int64 [cells + 1], where the steps of each cell start.
    - ``cell``: int32 [steps], the cell of each step.
    - ``first_cells``: int64 [tensors + 1], the first cell of each tensor.

    ``release()`` gives back the memory of what has been read of files.
    """

    def __init__(
        self,
        slopes: NDArray[np.float64],
        gains: NDArray[np.float64],
        costs: NDArray[np.int64],
        least: NDArray[np.int64],
        states: NDArray[np.uint8],
        lengths: list[NDArray[np.int64]],
        inputs: list[int],
        release: Callable[[], None],
    ) -> None:
        self.release = release
        self.slopes, self.gains, self.costs, self.least = slopes, gains, costs, least
        self._states, self._inputs = states, inputs
        every = np.concatenate([np.zeros(1, dtype=np.int64), *lengths])
        self.starts: NDArray[np.int64] = np.cumsum(every)
        self.cell: NDArray[np.int32] = np.repeat(np.arange(every.size - 1, dtype=np.int32), every[1:])
        self.first_cells = np.cumsum([0, *(part.size for part in lengths)])
        steps = [int(part.sum()) for part in lengths]
        self._first_states = np.cumsum([0, *(count * size for count, size in zip(steps, inputs, strict=True))])

    @property
    def tensors(self) -> int:
        """How many tensors there are."""
        return len(self._inputs)

    def states(self, tensor: int) -> NDArray[np.uint8]:
        """Return the level of every input after each step of a tensor (uint8 [steps, n])."""
        first, behind = self._first_states[tensor], self._first_states[tensor + 1]
        return self._states[first:behind].reshape(-1, self._inputs[tensor])

    def first_step(self, tensor: int) -> int:
        """Return the number of a tensor's first step."""
        return int(self.starts[self.first_cells[tensor]])


def sum_in_order(numbers: NDArray[np.float64]) -> float:
    """Return the sum, in the order of the numbers, so that with some of them 0 it is never larger."""
    total = np.zeros(1)
    for chunk in _chunks(numbers):
        total = np.cumsum(np.concatenate([total[-1:], chunk]))[-1:]
    return float(total[0])


def _chunks(numbers: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield numbers by pieces: sums of all of them at once would take as much memory again."""
    for first in range(0, numbers.size, _CHUNK):
        yield numbers[first : first + _CHUNK]
