"""Writes the files of a merged model into a staging directory: whole, hashed, and synced to disk.

Weight files are computed and written in chunks of whole pieces. What the journal of an earlier run tells of is read
back and used if its hashes agree; everything else is computed.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from blake3 import blake3

from mergefs.engine.ahead import in_order
from mergefs.engine.model_files import ModelFiles
from mergefs.errors import MaterializeError
from mergefs.materialize.journal import Journal, Piece, Read
from mergefs.materialize.manifest import PIECE, FileEntry, TensorEntry
from mergefs.materialize.system import read_all, sync, sync_directory, write_all
from mergefs.planner.plan import OutputFile, TensorPlan
from mergefs.progress import Progress
from mergefs.statistics.identity import content_digest

_CHUNK: Final = 8 * PIECE
_AHEAD: Final = 4
"""Chunks that are computed while earlier ones are written."""
_SYNC_BYTES: Final = 64 * 2**20
"""What a loss of power may cost: after so many bytes a file is synced, and what is then on disk written down."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: hashes by name, and the bytes that were found to be there from an earlier run.

    ``contents`` are the digests that the tensors are known by as inputs (``content_digest``).
    """

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    contents: dict[str, bytes]
    reused_bytes: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A run of whole pieces of a file; ``kept`` says that it lies in the file already."""

    offset: int
    data: bytes
    pieces: tuple[str, ...]
    kept: bool


class ModelWriter:
    """Writes one model into ``directory``.

    ``proven`` are the pieces that a journal tells of, by file and number; ``spent`` says what this run has read so far.
    """

    def __init__(
        self,
        files: ModelFiles,
        directory: Path,
        journal: Journal,
        proven: Mapping[str, Mapping[int, str]],
        progress: Progress,
        spent: Callable[[], Read],
    ) -> None:
        self._files = files
        self._directory = directory
        self._journal = journal
        self._proven = proven
        self._progress = progress
        self._spent = spent

    def write(self) -> Written:
        """Write every file, and remove what else lies in the directory.

        Raises MaterializeError when the disk fails, and the errors of the engine.
        """
        entries: dict[str, FileEntry] = {}
        hashes: list[_TensorHashes] = []
        reused = 0
        self._clear()
        weights = {file.name: file for file in self._files.plan.files}
        workers = max(2, os.cpu_count() or 2)
        with (
            ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="sync") as syncing,
        ):
            for name, size in self._files.sizes.items():
                path = self._directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if name in weights:
                    entries[name], kept = self._write_weights(path, weights[name], pool, syncing, hashes)
                    reused += kept
                else:
                    entries[name] = write_file(path, self._files.read(name, 0, size))
                    self._progress.advance(size)
        tensors = {name: entry for one in hashes for name, entry in one.entries().items()}
        contents = {name: content for one in hashes for name, content in one.contents().items()}
        return Written(entries, tensors, contents, reused)

    def _clear(self) -> None:
        """Remove what is not to be used again: all but weight files that the journal tells of."""
        for path in sorted(self._directory.rglob("*"), reverse=True):
            name = path.relative_to(self._directory).as_posix()
            try:
                if stat.S_ISDIR(path.lstat().st_mode):
                    with suppress(OSError):
                        path.rmdir()  # unless there are files in it that stay
                elif name not in self._proven or not path.is_file() or path.is_symlink():
                    path.unlink()
            except OSError as error:
                raise _failed(path, 0, error) from error

    def _write_weights(
        self,
        path: Path,
        file: OutputFile,
        pool: ThreadPoolExecutor,
        syncing: ThreadPoolExecutor,
        hashes: list["_TensorHashes"],
    ) -> tuple[FileEntry, int]:
        """Write one weight file, add the ``hashes`` of its tensors; return its entry and the bytes used again."""
        whole, parts = blake3(), _TensorHashes(self._files, file)
        pieces: list[str] = []
        reused = done = 0
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                sync_directory(path.parent)  # so that the name is there as soon as pieces are
                if os.fstat(descriptor).st_size > file.size:
                    os.ftruncate(descriptor, file.size)
                with _Durable(descriptor, file.name, self._journal, syncing, self._spent) as durable:
                    for chunk in self._chunks(descriptor, file, pool):
                        if chunk.kept:
                            reused += len(chunk.data)
                        else:
                            write_all(descriptor, chunk.data, chunk.offset)
                            durable.add(chunk)
                        whole.update(chunk.data)
                        parts.update(chunk.offset, chunk.data)
                        pieces += chunk.pieces
                        done += len(chunk.data)
                        self._progress.advance(len(chunk.data))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _failed(path, done, error) from error
        hashes.append(parts)
        return FileEntry(file.size, whole.hexdigest(), tuple(pieces)), reused

    def _chunks(self, descriptor: int, file: OutputFile, pool: ThreadPoolExecutor) -> Iterator[_Chunk]:
        """Yield a file in order, computing a few chunks ahead."""
        proven = self._proven.get(file.name, {})

        def obtain(offset: int) -> _Chunk:
            size = min(_CHUNK, file.size - offset)
            first = offset // PIECE
            told = [proven.get(index) for index in range(first, first + -(-size // PIECE))]
            if None not in told:
                data = read_all(descriptor, size, offset)
                pieces = hash_pieces(data)
                if len(data) == size and list(pieces) == told:
                    return _Chunk(offset, data, pieces, kept=True)
            data = self._files.read(file.name, offset, size)
            return _Chunk(offset, data, hash_pieces(data), kept=False)

        return ahead(pool, obtain, range(0, file.size, _CHUNK))


class _Durable:
    """Syncs a file every so often, in another thread, and writes down in the journal which pieces are on disk then.

    At the end of a ``with`` block, also of one that failed, what was written until then is made durable, too: an
    interruption or a full disk then costs nothing of it.
    """

    def __init__(
        self,
        descriptor: int,
        name: str,
        journal: Journal,
        syncing: ThreadPoolExecutor,
        spent: Callable[[], Read],
    ) -> None:
        self._descriptor = descriptor
        self._name = name
        self._journal = journal
        self._syncing = syncing
        self._spent = spent
        self._pieces: list[Piece] = []
        self._bytes = 0
        self._running: Future[None] | None = None

    def add(self, chunk: _Chunk) -> None:
        """Take over the pieces of a chunk that has been written. Raises OSError of earlier syncs."""
        first = chunk.offset // PIECE
        self._pieces += [Piece(self._name, first + index, digest) for index, digest in enumerate(chunk.pieces)]
        self._bytes += len(chunk.data)
        if self._bytes >= _SYNC_BYTES:
            self._wait()
            self._running = self._syncing.submit(self._sync, tuple(self._pieces))
            self._pieces, self._bytes = [], 0

    def __enter__(self) -> "_Durable":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._wait()
            self._sync(tuple(self._pieces))
            return
        with suppress(OSError):  # there is an error already
            self._wait()
            self._sync(tuple(self._pieces))

    def _wait(self) -> None:
        """Wait for the sync that is under way."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def _sync(self, pieces: tuple[Piece, ...]) -> None:
        """Sync, and then write down what that has made durable."""
        sync(self._descriptor)
        if pieces:
            self._journal.append([*pieces, self._spent()])


@dataclass(slots=True)
class _TensorHashes:
    """Hashes the tensors of one weight file, which comes in order."""

    files: ModelFiles
    file: OutputFile
    _current: int = 0
    _hasher: blake3 = field(default_factory=blake3)
    _blocks: "_BlockHashes" = field(default_factory=lambda: _BlockHashes(0))
    _digests: list[str] = field(default_factory=list)
    _contents: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin()

    def update(self, offset: int, data: bytes) -> None:
        """Take the next bytes of the file, which lie at ``offset``."""
        view = memoryview(data)
        while self._current < len(self.file.tensors):
            begin = self.file.offsets[self._current]
            end = begin + self._size(self._current)
            if begin >= offset + len(data) and end > begin:
                return
            part = view[max(begin - offset, 0) : max(end - offset, 0)]
            self._hasher.update(part)
            self._blocks.update(part)
            if end > offset + len(data):
                return
            plan = self._plan(self._current)
            self._digests.append(self._hasher.hexdigest())
            self._contents.append(content_digest(plan.dtype, plan.shape, self._blocks.finish()))
            self._current += 1
            self._begin()

    def _begin(self) -> None:
        """Begin with the next tensor, where there is one."""
        self._hasher = blake3()
        if self._current < len(self.file.tensors):
            plan = self._plan(self._current)
            self._blocks = _BlockHashes(plan.grid.step * plan.dtype.itemsize)

    def entries(self) -> dict[str, TensorEntry]:
        """Return the entry of every tensor, once the whole file has been seen."""
        plans = self.files.plan.tensors
        return {
            name: TensorEntry(self.file.name, offset, self._size(index), plans[name].dtype.name, plans[name].shape, one)
            for index, (name, offset, one) in enumerate(
                zip(self.file.tensors, self.file.offsets, self._digests, strict=True)
            )
        }

    def contents(self) -> dict[str, bytes]:
        """Return the digest of every tensor's contents, once the whole file has been seen."""
        return dict(zip(self.file.tensors, self._contents, strict=True))

    def _size(self, index: int) -> int:
        return self._plan(index).nbytes

    def _plan(self, index: int) -> TensorPlan:
        return self.files.plan.tensors[self.file.tensors[index]]


class _BlockHashes:
    """Hashes each block, of ``step`` bytes, of a tensor that comes in order; the last one may be shorter."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._left = step
        self._hasher = blake3()
        self._hashes: list[bytes] = []

    def update(self, part: memoryview) -> None:
        """Take the next bytes."""
        while part:
            taken = part[: self._left]
            self._hasher.update(taken)
            self._left -= len(taken)
            part = part[len(taken) :]
            if not self._left:
                self._end_block()

    def finish(self) -> list[bytes]:
        """Return the hashes of all blocks."""
        if self._left < self._step:
            self._end_block()
        return self._hashes

    def _end_block(self) -> None:
        self._hashes.append(self._hasher.digest())
        self._hasher, self._left = blake3(), self._step


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write one new file, sync it, and return its size and hash. Permissions follow the umask.

    Raises MaterializeError.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, data)
            sync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _failed(path, 0, error) from error
    return FileEntry(len(data), blake3(data).hexdigest())


def hash_pieces(data: bytes) -> tuple[str, ...]:
    """Return the hash in hex of each piece of ``data``, which begins where a piece begins."""
    view = memoryview(data)
    return tuple(blake3(view[begin : begin + PIECE]).hexdigest() for begin in range(0, len(data), PIECE))


def ahead(pool: ThreadPoolExecutor, obtain: Callable[[int], _Result], offsets: Sequence[int]) -> Iterator[_Result]:
    """Yield ``obtain(offset)`` for every offset in order, a few of them computed ahead of who takes them."""
    return in_order(pool, obtain, offsets, _AHEAD)


def _failed(path: Path, done: int, error: OSError) -> MaterializeError:
    """Return the error for a disk that takes no more."""
    return MaterializeError(
        f"{path}: writing failed after {done} bytes ({error.strerror}); free space or repair the disk, and run again "
        "with --resume, or choose another place: the destination is as it was"
    )
