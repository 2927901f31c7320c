"""One weight file, in chunks of whole pieces: any thread computes and writes them, one takes note of them in order.

What the journal of an earlier run tells of is read back and used if its hashes agree; everything else is computed.
"""

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mergefs.engine.model_files import ModelFiles
from mergefs.errors import MaterializeError
from mergefs.materialize.durability import Durability
from mergefs.materialize.manifest import PIECE, FileEntry
from mergefs.materialize.output import Buffers, Output, failed
from mergefs.materialize.pieces import hash_pieces
from mergefs.materialize.preparation import Preparation
from mergefs.materialize.sharing import Range, Sharing
from mergefs.materialize.tensor_hashes import TensorHashes
from mergefs.planner.plan import OutputFile

CHUNK: Final = 8 * PIECE
_READ_AHEAD: Final = 2 * CHUNK
"""How far ahead of a chunk the disk is read."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of whole pieces that lies in the file; ``kept`` says that it did before. ``buffer`` is lent.

    ``shared`` of its bytes are those of sources, on disk as well.
    """

    offset: int
    size: int
    buffer: memoryview
    pieces: tuple[str, ...]
    kept: bool
    shared: int = 0


class WeightFile:
    """One weight file of a model that is being written. ``proven`` are pieces that a journal tells of, by number.

    Whoever computes has one of the ``processors`` meanwhile.
    """

    def __init__(
        self,
        output: Output,
        file: OutputFile,
        files: ModelFiles,
        durability: Durability,
        proven: Mapping[int, str],
        buffers: Buffers,
        processors: threading.Semaphore,
        preparation: Preparation,
    ) -> None:
        self.tensors = TensorHashes(files.plan, file)
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
        self._pieces: list[str] = []
        self._done = 0

    def offsets(self) -> Iterator[int]:
        """Yield where each chunk begins."""
        yield from range(0, self._file.size, CHUNK)

    def announce(self, offset: int) -> None:
        """Have what a chunk needs in memory, and let what those behind it need be on its way."""
        if self._proven:  # by an earlier run, so that perhaps nothing is needed
            return
        for name in self._tensors_in(offset):
            self._preparation.reach(name)
        begin = 0 if offset == 0 else offset + _READ_AHEAD
        self._files.engine.will_read(self._file.name, begin, offset + _READ_AHEAD + CHUNK - begin)

    def make(self, offset: int) -> Chunk:
        """Bring a chunk into the file, and return it; any thread may do that.

        Raises MaterializeError when the disk fails, and the errors of the engine.
        """
        buffer = self._buffers.take()
        try:
            view = buffer[: min(CHUNK, self._file.size - offset)]
            pieces = self._kept(offset, view)
            kept = pieces is not None
            shared: tuple[Range, ...] = ()
            if pieces is None:
                for name in self._tensors_in(offset):
                    self._files.engine.prepare_tensor(name)  # or others would wait for that in vain, too
                with self._processors:
                    self._files.read_into(self._file.name, offset, view)
                    pieces = hash_pieces(view)
                shared = self._sharing.share(offset, len(view))
                self._output.write(view, offset, shared)
            return Chunk(offset, len(view), buffer, pieces, kept, sum(end - begin for begin, end in shared))
        except OSError as error:
            self._buffers.give_back(buffer)
            raise self._failed(error) from error
        except BaseException:
            self._buffers.give_back(buffer)
            raise

    def take(self, chunk: Chunk) -> None:
        """Take note of the next chunk of the file. Raises MaterializeError when an earlier one could not be synced."""
        view = chunk.buffer[: chunk.size]
        with self._processors:
            ended = self.tensors.update(chunk.offset, view)
        for name in ended:
            self._preparation.finish(name)
        self._pieces += chunk.pieces
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
            self._durability.add(chunk.offset // PIECE, chunk.pieces, chunk.size)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> FileEntry:
        """Wait until all of it is durable, and return its entry. Raises MaterializeError."""
        try:
            self._durability.wait()
        except OSError as error:
            raise self._failed(error) from error
        return FileEntry.of_pieces(self._file.size, tuple(self._pieces))

    def save(self) -> None:
        """Make durable what was noted, after an error."""
        self._durability.save()

    def close(self) -> None:
        """Close the file."""
        self._output.close()

    def _kept(self, offset: int, view: memoryview) -> tuple[str, ...] | None:
        """Read a chunk that an earlier run has written, and return its pieces, None unless all are proven."""
        first = offset // PIECE
        told = [self._proven.get(index) for index in range(first, first + -(-len(view) // PIECE))]
        if None in told or not self._output.read(view, offset):
            return None
        pieces = hash_pieces(view)
        return pieces if list(pieces) == told else None

    def _tensors_in(self, offset: int) -> Sequence[str]:
        """Return the tensors that a chunk holds anything of."""
        first = max(bisect_right(self._file.offsets, offset) - 1, 0)
        return self._file.tensors[first : bisect_left(self._file.offsets, offset + CHUNK)]

    def _failed(self, error: OSError) -> MaterializeError:
        return failed(self._output.path, self._done, error)
