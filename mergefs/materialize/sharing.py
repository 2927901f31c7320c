"""What of a weight file is a plain copy is shared with its source, where a file system can do that (XFS, btrfs).

The bytes are read, checked and hashed as any others before; only writing them again is saved. Whole blocks of the file
system can be shared where they lie at the same place of a block in both files, which files are laid out for.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergefs.checkpoint.source import Shard
from mergefs.errors import SourceReadError
from mergefs.materialize.output import Output
from mergefs.planner.copies import SMALLEST, copies
from mergefs.planner.plan import OutputFile, TensorPlan
from mergefs.sources.reader import SourceReader

Range = tuple[int, int]
"""Where a run of bytes begins in a file, and where it ends."""


@dataclass(frozen=True, slots=True)
class FileCopy:
    """The bytes ``begin`` to ``end`` of a weight file: those of ``shard`` that lie ``shift`` bytes further there."""

    begin: int
    end: int
    shard: Shard
    shift: int


def file_copies(file: OutputFile, tensors: Mapping[str, TensorPlan]) -> list[FileCopy]:
    """Return what is copied of a weight file, in order; what lies side by side in both files is one run."""
    found: list[FileCopy] = []
    for name, offset in zip(file.tensors, file.offsets, strict=True):
        for copy in copies(tensors[name]):
            shard, shift = copy.source.shard, copy.source.tensor.offset - offset
            begin, end = offset + copy.begin, offset + copy.end
            if found and (found[-1].end, found[-1].shard, found[-1].shift) == (begin, shard, shift):
                begin = found.pop().begin
            found.append(FileCopy(begin, end, shard, shift))
    return found


class Sharing:
    """Shares runs of one weight file with its sources. Safe to share between threads."""

    def __init__(
        self, output: Output, file: OutputFile, tensors: Mapping[str, TensorPlan], reader: SourceReader
    ) -> None:
        self._output = output
        self._reader = reader
        block = output.block_size
        self._copies = [copy for copy in file_copies(file, tensors) if copy.shift % block == 0]
        self._begins = [copy.begin for copy in self._copies]
        self._impossible: set[Path] = set()

    def share(self, offset: int, size: int) -> tuple[Range, ...]:
        """Share what can be of ``size`` bytes at ``offset``, which have been read, and return those ranges, in order.

        They begin and end with blocks. Nothing is shared where the file system cannot do that. Raises
        SourceChangedError.
        """
        return tuple(
            (begin, end)
            for begin, end, copy in self._whole_blocks(offset, offset + size)
            if self._share(copy, begin, end)
        )

    def _whole_blocks(self, begin: int, end: int) -> Iterator[tuple[int, int, FileCopy]]:
        """Yield the runs of whole blocks that are copied of a range, if they are worth it."""
        block = self._output.block_size
        index = max(bisect_right(self._begins, begin) - 1, 0)
        while index < len(self._copies) and (copy := self._copies[index]).begin < end:
            first = -(-max(copy.begin, begin) // block) * block
            last = min(copy.end, end) // block * block
            if last - first >= SMALLEST:
                yield first, last, copy
            index += 1

    def _share(self, copy: FileCopy, begin: int, end: int) -> bool:
        """Share one run, and return whether that has been possible."""
        shard = copy.shard
        if shard.path in self._impossible:
            return False
        try:
            # What is shared is what was hashed: a write to the source between the read, or an analysis, and this would
            # show in its time of change, which is looked at after the read, and again when the descriptor is returned.
            with self._reader.lend(shard) as descriptor:
                self._output.share(descriptor, begin + copy.shift, begin, end)
        except (OSError, SourceReadError):  # other file systems, or one that cannot; and writing is always possible
            self._impossible.add(shard.path)
            return False
        return True
