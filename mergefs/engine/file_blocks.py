"""The blocks of one merged file, for who has them computed before they are read."""

from dataclasses import dataclass
from typing import Final

from mergefs.engine.engine import Engine

_GONE_ON: Final = 2 * 2**20
"""Bytes: more than the kernel reads behind what somebody asks for."""


@dataclass(frozen=True, slots=True)
class FileBlocks:
    """The blocks that the weight file ``name``, of ``size`` bytes, is computed by. Safe to share between threads."""

    engine: Engine
    name: str
    size: int

    def end_of(self, position: int) -> int:
        """Return where the block ends that has the byte at ``position``, which lies in the file."""
        return self.engine.block_end(self.name, position)

    def reach(self, begin: int, end: int) -> int:
        """Return how far may be computed ahead of a reader that has read from ``begin`` to ``end`` so far.

        To the end of the tensor that it began with, until it has gone on well into the next ones: then it runs through
        the file. A loader that wants a single tensor, behind which the kernel reads on a little by itself, must not
        have the statistics of others gathered, which can mean to read all of them.
        """
        first = self.engine.tensor_end(self.name, begin)
        if begin < self.engine.header_size(self.name) and first < self.size:
            first = self.engine.tensor_end(self.name, first)
        return self.size if end >= first + _GONE_ON else first

    def will_read(self, begin: int, end: int) -> None:
        """Have the system hold what a range is computed from."""
        self.engine.will_read(self.name, begin, end - begin)

    def compute(self, position: int) -> None:
        """Have the block that has the byte at ``position`` in the cache, unless it is a copy of a source's."""
        self.engine.compute_ahead(self.name, position)
