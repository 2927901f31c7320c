"""Pieces of weight files, the hashes of which everything else is told by: of what was written, and of what is there.

A piece is a block that a tensor is known by (``BlockGrid.of_contents``), or a part of the header: so one hash of a byte
serves its file and its tensor. Where pieces begin follows from the shapes and the header's size alone.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

from blake3 import blake3

from mergefs.checkpoint.dtypes import DType
from mergefs.engine.ahead import in_order
from mergefs.planner.plan import OutputFile, TensorPlan
from mergefs.sources.blocks import BlockGrid

HEADER_PIECE: Final = 2**20
"""Bytes of the pieces of a header; the last one may be shorter."""
_AHEAD: Final = 4
"""Runs that are computed while earlier ones are taken."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where the pieces of one file begin and end: each at one of ``bounds`` and at the next.

    ``tensors`` has the numbers of the pieces of each tensor, in the order of the file; of one without elements, none.
    """

    bounds: tuple[int, ...]
    tensors: Mapping[str, range]

    @classmethod
    def of(cls, size: int, tensors: Iterable[tuple[str, int, DType, tuple[int, ...]]]) -> "Pieces":
        """Cut a file of ``size`` bytes. ``tensors`` are name, offset, dtype and shape, in order and side by side."""
        bounds, found = [0], {}
        listed = list(tensors)
        data = listed[0][1] if listed else size
        bounds += [*range(HEADER_PIECE, data, HEADER_PIECE), data]
        for name, offset, dtype, shape in listed:
            first = len(bounds) - 1
            bounds += [offset + end * dtype.itemsize for _, end in BlockGrid.of_contents(shape)]
            found[name] = range(first, len(bounds) - 1)
        return cls(tuple(bounds), found)

    @classmethod
    def of_output(cls, file: OutputFile, tensors: Mapping[str, TensorPlan]) -> "Pieces":
        """Cut a file that is planned."""
        placed = zip(file.tensors, file.offsets, strict=True)
        return cls.of(file.size, ((name, offset, tensors[name].dtype, tensors[name].shape) for name, offset in placed))

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return len(self.bounds) - 1

    def at(self, position: int) -> int:
        """Return the number of the piece that has a byte of the file."""
        return bisect_right(self.bounds, position) - 1

    def within(self, begin: int, end: int) -> range:
        """Return the pieces that lie in a range of the file as a whole."""
        first = bisect_left(self.bounds, begin)
        return range(first, max(first, bisect_right(self.bounds, end) - 1))

    def cuts(self, begin: int, end: int) -> tuple[int, ...]:
        """Return the ends of a range of the file, which is not empty, and all bounds of pieces between them."""
        inside = self.bounds[bisect_right(self.bounds, begin) : bisect_left(self.bounds, end)]
        return (begin, *inside, end)

    def tensor_of(self, piece: int) -> str | None:
        """Return the tensor that a piece is of, None for one of the header."""
        return next((name for name, numbers in self.tensors.items() if piece in numbers), None)

    def runs(self, size: int) -> Iterator[range]:
        """Yield all pieces in order, as many together as have ``size`` bytes; at least one."""
        first = 0
        while first < self.count:
            last = max(bisect_right(self.bounds, self.bounds[first] + size) - 1, first + 1)
            yield range(first, last)
            first = last

    def hashes(self, numbers: range, view: memoryview) -> tuple[str, ...]:
        """Return the hash in hex of each of some pieces side by side, with which ``view`` begins."""
        return hash_between(self.bounds[numbers.start : numbers.stop + 1], view)


def hash_between(
    cuts: Sequence[int], view: memoryview, known: Mapping[tuple[int, int], str] | None = None
) -> tuple[str, ...]:
    """Return the hash in hex of each part between two ``cuts``, from the first of which on ``view`` has the bytes.

    What is ``known`` of parts, by their ends, is not hashed again.
    """
    found = known or {}
    return tuple(
        found.get((begin, end)) or blake3(view[begin - cuts[0] : end - cuts[0]]).hexdigest()
        for begin, end in pairwise(cuts)
    )


def ahead(pool: Executor, obtain: Callable[[int], _Result], numbers: Sequence[int]) -> Iterator[_Result]:
    """Yield ``obtain(number)`` for every number in order, a few of them computed ahead of who takes them."""
    return in_order(pool, obtain, numbers, _AHEAD)
