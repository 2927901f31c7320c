"""One weight file, in chunks: any thread computes and writes them, one takes note of them in order.

What the journal of an earlier run tells of is read back and used if its hashes agree; everything else is computed.
"""

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from mergefs.engine.model_files import ModelFiles
from mergefs.errors import MaterializeError
from mergefs.materialize.durability import Durability
from mergefs.materialize.file_hashes import FileHashes
from mergefs.materialize.journal import Part
from mergefs.materialize.manifest import FileEntry
from mergefs.materialize.output import Buffers, Output, failed
from mergefs.materialize.pieces import Pieces, hash_between
from mergefs.materialize.preparation import Preparation
from mergefs.materialize.sharing import Range, Sharing
from mergefs.planner.plan import OutputFile

CHUNK: Final = 8 * 2**20
"""Bytes; whole pages of memory and of the disk."""
_READ_AHEAD: Final = 2 * CHUNK
"""How far ahead of a chunk the disk is read."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of bytes that lies in the file; ``kept`` says that it did before. ``buffer`` is lent.

    ``hashes`` are those of its parts, which pieces and its own ends cut it into at ``cuts``; ``shared`` of its bytes
    are those of sources, on disk as well.
    """

    offset: int
    size: int
    buffer: memoryview
    cuts: tuple[int, ...]
    hashes: tuple[str, ...]
    kept: bool
    shared: int = 0


class WeightFile:
    """One weight file of a model that is being written. ``proven`` are parts that a journal tells of, by offset.

    Whoever computes has one of the ``processors`` meanwhile.
    """

    def __init__(
        self,
        output: Output,
        file: OutputFile,
        files: ModelFiles,
        durability: Durability,
        proven: Mapping[int, Part],
        buffers: Buffers,
        processors: threading.Semaphore,
        preparation: Preparation,
    ) -> None:
        self._pieces = Pieces.of_output(file, files.plan.tensors)
        self.hashes = FileHashes(file, files.plan.tensors, self._pieces)
        self.reused_bytes = self.shared_bytes = 0
        self._output = output
        self._file = file
        self._files = files
        self._sharing = Sharing(output, file, files.plan.tensors, files.reader)
        self._durability = durability
        self._proven = proven
        self._buffers = buffers
        self._processors = processors
        self._preparation = preparation
        self._done = 0

    def offsets(self) -> Iterator[int]:
        """Yield where each chunk begins."""
        yield from range(0, self._file.size, CHUNK)

    def announce(self, offset: int) -> None:
        """Have what a chunk needs in memory, and let what those behind it need be on its way."""
        if self._told(offset) is None:
            for name in self._tensors_in(offset):
                self._preparation.reach(name)
        for begin in range(0 if offset == 0 else offset + _READ_AHEAD, offset + _READ_AHEAD + 1, CHUNK):
            if begin < self._file.size and self._told(begin) is None:
                self._files.engine.will_read(self._file.name, begin, CHUNK)

    def make(self, offset: int) -> Chunk:
        """Bring a chunk into the file, and return it; any thread may do that.

        Raises MaterializeError when the disk fails, and the errors of the engine.
        """
        buffer = self._buffers.take()
        try:
            view = buffer[: min(CHUNK, self._file.size - offset)]
            cuts = self._pieces.cuts(offset, offset + len(view))
            kept = self._kept(offset, view)
            shared: tuple[Range, ...] = ()
            if kept is None:
                for name in self._tensors_in(offset):
                    self._files.engine.prepare_tensor(name)  # or others would wait for that in vain, too
                with self._processors:
                    self._files.read_into(self._file.name, offset, view)
                    hashes = hash_between(cuts, view)
                shared = self._sharing.share(offset, len(view))
                self._output.write(view, offset, shared)
            else:
                hashes = hash_between(cuts, view, kept)
            written = sum(end - begin for begin, end in shared)
            return Chunk(offset, len(view), buffer, cuts, hashes, kept is not None, written)
        except OSError as error:
            self._buffers.give_back(buffer)
            raise self._failed(error) from error
        except BaseException:
            self._buffers.give_back(buffer)
            raise

    def take(self, chunk: Chunk) -> None:
        """Take note of the next chunk of the file. Raises MaterializeError when an earlier one could not be synced."""
        view = chunk.buffer[: chunk.size]
        self.hashes.update(chunk.offset, view, chunk.hashes)
        for name in self.hashes.ended():
            self._preparation.finish(name)
        self._done += chunk.size
        self.note(chunk)
        if self._done == self._file.size:
            self._durability.begin_sync()

    def note(self, chunk: Chunk) -> None:
        """Let a chunk become durable. Raises MaterializeError."""
        self._buffers.give_back(chunk.buffer)
        if chunk.kept:
            self.reused_bytes += chunk.size
            return
        self.shared_bytes += chunk.shared
        try:
            self._durability.add(chunk.cuts, chunk.hashes)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> FileEntry:
        """Wait until all of it is durable, and return its entry. Raises MaterializeError."""
        try:
            self._durability.wait()
        except OSError as error:
            raise self._failed(error) from error
        return self.hashes.file_entry()

    def save(self) -> None:
        """Make durable what was noted, after an error."""
        self._durability.save()

    def close(self) -> None:
        """Close the file."""
        self._output.close()

    def _told(self, offset: int) -> list[Part] | None:
        """Return the parts that a journal tells a chunk to consist of; None where it does not tell of all of it."""
        position, end, found = offset, min(offset + CHUNK, self._file.size), []
        while position < end:
            part = self._proven.get(position)
            if part is None or position + part.size > end:
                return None
            found.append(part)
            position += part.size
        return found

    def _kept(self, offset: int, view: memoryview) -> dict[tuple[int, int], str] | None:
        """Read a chunk that an earlier run has written, and return the hashes of its parts by where they lie.

        None unless all of them are what the journal tells.
        """
        told = self._told(offset)
        if told is None or not self._output.read(view, offset):
            return None
        found = {}
        for part in told:
            begin, end = part.offset, part.offset + part.size
            found[begin, end] = blake3(view[begin - offset : end - offset]).hexdigest()
            if found[begin, end] != part.blake3:
                return None
        return found

    def _tensors_in(self, offset: int) -> Sequence[str]:
        """Return the tensors that a chunk holds anything of."""
        first = max(bisect_right(self._file.offsets, offset) - 1, 0)
        return self._file.tensors[first : bisect_left(self._file.offsets, offset + CHUNK)]

    def _failed(self, error: OSError) -> MaterializeError:
        return failed(self._output.path, self._done, error)
