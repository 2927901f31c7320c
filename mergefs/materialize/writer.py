"""Writes the files of merged models into staging directories: whole, hashed, and synced to disk.

Chunks of weight files are read for, computed, written and hashed side by side on a bounded pool of threads, while what
was written before is synced. Models that are written together are computed in step, so that what they have in common is
read once.
"""

import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergefs.engine.model_files import ModelFiles
from mergefs.materialize.durability import Durability
from mergefs.materialize.journal import Journal, Part, Read
from mergefs.materialize.manifest import FileEntry, TensorEntry
from mergefs.materialize.output import Buffers, Output, failed, write_file
from mergefs.materialize.preparation import Preparation
from mergefs.materialize.weights import CHUNK, Chunk, WeightFile
from mergefs.progress import Progress

_WAITING: Final = 2
"""Threads beside those that compute: they wait for the disk meanwhile."""
_AHEAD: Final = 2
"""Chunks that are finished and wait for their turn to be taken note of, beside those that threads are at work on."""
_TURN: Final = 0.001
"""Seconds that a thread may keep Python for itself while another waits for it. What chunks are made by goes on without
Python, and takes less than the five milliseconds that are usual."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: hashes by name, and the bytes that were found to be there from an earlier run, or are shared.

    ``contents`` are the digests that the tensors are known by as inputs (``content_digest``).
    """

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    contents: dict[str, bytes]
    reused_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class _Workshop:
    """What models are written with.

    ``ahead`` is how many chunks there are at a time, ``held_size`` how many bytes of inputs can be held.
    """

    pool: ThreadPoolExecutor
    syncing: ThreadPoolExecutor
    reading_ahead: ThreadPoolExecutor
    buffers: Buffers
    processors: threading.Semaphore
    ahead: int
    held_size: int


@dataclass(frozen=True, slots=True)
class _Job:
    """One chunk of one model."""

    writer: "ModelWriter"
    file: WeightFile
    offset: int

    def make(self, announced: Future[None]) -> Chunk:
        """Make the chunk when what it is made from is there: else threads would read the disk in disorder."""
        announced.result()
        return self.file.make(self.offset)


class ModelWriter:
    """Writes one model into ``directory``.

    ``proven`` are the parts that a journal tells of, by file and offset; ``spent`` says what this run has read so far.
    After ``write_models`` an ``error`` says why the model is not complete.
    """

    def __init__(
        self,
        files: ModelFiles,
        directory: Path,
        journal: Journal,
        proven: Mapping[str, Mapping[int, Part]],
        progress: Progress,
        spent: Callable[[], Read],
    ) -> None:
        self.error: Exception | None = None
        self._files = files
        self._directory = directory
        self._journal = journal
        self._proven = proven
        self._progress = progress
        self._spent = spent
        self._entries: dict[str, FileEntry] = {}
        self._weights: dict[str, WeightFile] = {}

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weight files."""
        return sum(file.size for file in self._files.plan.files)

    def begin(self) -> None:
        """Write all but the weights, and remove what else lies in the directory. Raises MaterializeError."""
        self._clear()
        for name, size in self._files.sizes.items():
            if not self._files.is_merged(name):
                path = self._directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._entries[name] = write_file(path, self._files.read(name, 0, size))
                self._progress.advance(size)

    def jobs(self, workshop: _Workshop) -> Iterator[_Job]:
        """Yield the chunks of all weight files in order. Raises MaterializeError."""
        files = sorted(self._files.plan.files, key=lambda file: file.name)
        preparation = Preparation(self._files.engine, files, workshop.pool, workshop.held_size)
        for file in files:
            path = self._directory / file.name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                output = Output(path, file.size)
            except OSError as error:
                raise failed(path, 0, error) from error
            durability = Durability(output, file.name, self._journal, workshop.syncing, self._spent)
            proven = self._proven.get(file.name, {})
            weights = WeightFile(
                output,
                file,
                self._files,
                durability,
                proven,
                workshop.buffers,
                workshop.processors,
                preparation,
            )
            self._weights[file.name] = weights
            for offset in weights.offsets():
                yield _Job(self, weights, offset)

    def take(self, job: _Job, chunk: Chunk) -> None:
        """Take note of the next chunk. Raises MaterializeError."""
        job.file.take(chunk)
        self._progress.advance(chunk.size)

    def finish(self) -> None:
        """Wait until all is durable. Raises MaterializeError."""
        for name, weights in self._weights.items():
            self._entries[name] = weights.finish()

    def save(self) -> None:
        """Make durable what was noted, after an error."""
        for weights in self._weights.values():
            weights.save()

    def close(self) -> None:
        """Close all files."""
        for weights in self._weights.values():
            weights.close()

    def written(self) -> Written:
        """Return what was written. Raises the error that has kept the model from being complete."""
        if self.error is not None:
            raise self.error
        weights = self._weights.values()
        return Written(
            files={name: self._entries[name] for name in self._files.sizes},
            tensors={name: entry for one in weights for name, entry in one.hashes.entries().items()},
            contents={name: content for one in weights for name, content in one.hashes.contents().items()},
            reused_bytes=sum(one.reused_bytes for one in weights),
            shared_bytes=sum(one.shared_bytes for one in weights),
        )

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
                raise failed(path, 0, error) from error


def write_models(writers: Sequence[ModelWriter], threads: int, held_size: int) -> None:
    """Write several models in step, as far as each of them can be written; each then tells its ``error``.

    At most ``threads`` compute at a time; others write and sync meanwhile. ``held_size`` is how many bytes are held of
    inputs that something has to be learned from first. What interrupts the process interrupts all
    of them; what was finished by then is durable.
    """
    with _workshop(threads, held_size) as workshop:
        whole = False
        try:
            for writer in writers:
                with _blamed(writer):
                    writer.begin()
            _go_through(writers, workshop)
            for writer in writers:
                with _blamed(writer):
                    writer.finish()
            whole = True
        finally:
            for writer in writers:
                if not whole or writer.error is not None:
                    writer.save()
                writer.close()


def chunks_at_a_time(threads: int) -> int:
    """Return how many chunks there are in memory while so many threads compute."""
    return threads + _WAITING + _AHEAD


@contextmanager
def _workshop(threads: int, held_size: int) -> Iterator[_Workshop]:
    """Lend what models are written with."""
    ahead = chunks_at_a_time(threads)
    with (
        _short_turns(),
        ThreadPoolExecutor(threads + _WAITING, thread_name_prefix="merge") as pool,
        ThreadPoolExecutor(1, thread_name_prefix="sync") as syncing,
        ThreadPoolExecutor(1, thread_name_prefix="read ahead") as reading_ahead,
    ):
        processors = threading.Semaphore(threads)
        try:
            yield _Workshop(pool, syncing, reading_ahead, Buffers(ahead, CHUNK), processors, ahead, held_size)
        finally:
            for one in (reading_ahead, pool):
                one.shutdown(cancel_futures=True)


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads take turns more often."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, _TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@contextmanager
def _blamed(writer: ModelWriter) -> Iterator[None]:
    """Let an error end one model only; the first one is kept."""
    try:
        yield
    except Exception as error:
        writer.error = writer.error or error


def _go_through(writers: Sequence[ModelWriter], workshop: _Workshop) -> None:
    """Bring all chunks of all models to disk, some of them under way at a time."""
    under_way: deque[tuple[_Job, Future[Chunk]]] = deque()

    def take_next() -> None:
        job, future = under_way.popleft()
        with _blamed(job.writer):
            if job.writer.error is None:
                job.writer.take(job, future.result())
            elif not future.cancel():
                job.file.note(future.result())

    try:
        for job in _in_step(writers, workshop):
            announced = workshop.reading_ahead.submit(job.file.announce, job.offset)
            under_way.append((job, workshop.pool.submit(job.make, announced)))
            if len(under_way) >= workshop.ahead:
                take_next()
        while under_way:
            take_next()
    except BaseException:
        for job, future in under_way:
            if not future.cancel():
                with suppress(BaseException):  # there is an error already
                    job.file.note(future.result())
        raise


def _in_step(writers: Sequence[ModelWriter], workshop: _Workshop) -> Iterator[_Job]:
    """Yield the chunks of all models, each time one of the model of which the smallest share was yielded."""
    streams = {number: writer.jobs(workshop) for number, writer in enumerate(writers)}
    yielded = [0] * len(writers)
    while streams:
        number = min(streams, key=lambda number: yielded[number] / writers[number].weight_bytes)
        writer, job = writers[number], None
        with _blamed(writer):
            job = None if writer.error is not None else next(streams[number], None)
        if job is None:
            del streams[number]
        else:
            yielded[number] += CHUNK
            yield job
