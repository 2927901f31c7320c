"""Where the bytes of one tensor of one input come from: a file, or a computation over other places."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergefs.checkpoint.checkpoint import Checkpoint, TensorSource
from mergefs.checkpoint.dtypes import DType
from mergefs.checkpoint.source import Shard
from mergefs.kernels.precision import Raw
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.reader import SourceReader


class Role(Enum):
    """How a model takes part in a merge, and so who pays for its bytes."""

    EXPERT = "expert"
    BASE = "base"


class Place(ABC):
    """One tensor of one input of a merge, wherever its bytes come from. Immutable.

    ``shape`` and ``dtype`` are those of the bytes that ``read`` returns.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor as the merge sees it."""

    @property
    @abstractmethod
    def dtype(self) -> DType:
        """The type of the elements that are read."""

    @property
    @abstractmethod
    def parts(self) -> tuple["Place", ...]:
        """The places that it is computed from; none for a tensor that is stored in a file."""

    @property
    @abstractmethod
    def formula(self) -> bytes:
        """How it is computed: together with the contents of its parts this says what its content is."""

    @abstractmethod
    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Return the bytes of the elements ``start`` to ``stop`` (flat indices); they must not be written to.

        ``purpose`` is ANALYSIS, or EXPERT (EXPERT_AGAIN when they have been read before) for bytes that are served;
        what belongs to the base is counted as the base's then. Raises the errors of ``SourceReader.read``.
        """

    @abstractmethod
    def bytes_read(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """Return for each block of ``grid`` the bytes of files of that role that reading it takes."""

    def total_bytes_read(self, role: Role) -> int:
        """Return the bytes of files of that role that reading all of it takes."""
        return int(self.bytes_read(BlockGrid.of(self.shape), role).sum())

    @abstractmethod
    def describe(self) -> str:
        """Name file and tensor, for messages."""

    @property
    def divisible(self) -> bool:
        """Whether a budget may buy single blocks of it; else it buys all of them or none."""
        return all(part.divisible for part in self.parts)

    def kernels(self) -> Iterator[tuple[str, DType]]:
        """Yield the modules of ``mergefs.kernels.fused`` that it is computed with, each with a dtype."""
        for part in self.parts:
            yield from part.kernels()

    def prepare(self) -> None:
        """Gather what reading needs to know of whole tensors, so that ``read`` waits for nothing else."""
        for part in self.parts:
            part.prepare()

    def will_read(self, reader: SourceReader, start: int, stop: int) -> None:  # noqa: B027 (nothing is right for most)
        """Have the system hold what these elements (flat indices) are computed from, where that is easy."""

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return self.elements * self.dtype.itemsize

    def stored(self) -> Iterator["StoredTensor"]:
        """Yield every tensor in a file that it is computed from."""
        for part in self.parts:
            yield from part.stored()


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor(Place):
    """A tensor that lies in a file as it is. ``role`` says who pays for its bytes when they are served."""

    shard: Shard
    tensor: TensorSource
    role: Role = Role.EXPERT

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str, role: Role = Role.EXPERT) -> "StoredTensor":
        """Return the tensor ``name`` of ``checkpoint``."""
        tensor = checkpoint.tensors[name]
        return cls(checkpoint.shards[tensor.shard], tensor, role)

    @property
    def shape(self) -> tuple[int, ...]:
        """As its header says."""
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        """As its header says."""
        return self.tensor.dtype

    @property
    def parts(self) -> tuple[Place, ...]:
        """None: it is stored."""
        return ()

    @property
    def formula(self) -> bytes:
        """Nothing is computed."""
        return b""

    def read(self, reader: SourceReader, start: int, stop: int, purpose: Purpose) -> Raw:
        """Read from the file."""
        return reader.read_tensor(self.shard, self.tensor, start, stop, self._counted_as(purpose))

    def will_read(self, reader: SourceReader, start: int, stop: int) -> None:
        """They lie side by side in the file."""
        reader.will_read(self.shard, self.tensor, start, stop)

    def read_kept(self, reader: SourceReader, purpose: Purpose) -> Raw:
        """Return all bytes, read once and kept for other blocks, as an array that must not be written to."""
        return reader.read_kept(self.shard, self.tensor, self._counted_as(purpose))

    def bytes_read(self, grid: BlockGrid, role: Role) -> NDArray[np.int64]:
        """The block itself."""
        return block_sizes(grid) * (self.dtype.itemsize if role is self.role else 0)

    def total_bytes_read(self, role: Role) -> int:
        """The tensor."""
        return self.tensor.nbytes if role is self.role else 0

    def _counted_as(self, purpose: Purpose) -> Purpose:
        """Return on whose account bytes are that are read for ``purpose``."""
        return Purpose.BASE if self.role is Role.BASE and purpose is not Purpose.ANALYSIS else purpose

    def describe(self) -> str:
        """Name file and tensor."""
        return f"{self.shard.path}: tensor {self.tensor.name!r}"

    def stored(self) -> Iterator["StoredTensor"]:
        """Yield itself."""
        yield self


def block_sizes(grid: BlockGrid) -> NDArray[Any]:
    """Return the number of elements of each block (int64)."""
    sizes = np.full(grid.count, grid.step, dtype=np.int64)
    if grid.count:
        start, stop = grid.bounds(grid.count - 1)
        sizes[-1] = stop - start
    return sizes
