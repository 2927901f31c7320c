"""Reads ranges of source files with ``pread``: never mapped, every byte in the ledger, every file checked.

A file is checked against the fingerprint that the plan was made from when it is opened, and again on request; after
each read its size and the time of its last change are looked at once more, and blocks of tensors whose hashes are known
are held against them. What cannot be read becomes one of two errors: the file changed, or the operating system failed;
that may pass, so it is tried again first.
"""

import copy
import errno
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from mergefs.checkpoint.checkpoint import TensorSource
from mergefs.checkpoint.source import FileKey, Fingerprint, Shard, SourceFile
from mergefs.errors import MergefsError, SourceChangedError, SourceReadError
from mergefs.kernels.precision import Raw
from mergefs.sources.cache import BlockCache
from mergefs.sources.filling import PageCacheFiller
from mergefs.sources.holding import HeldBlocks
from mergefs.sources.ledger import Ledger, Purpose
from mergefs.sources.sharing import SharedBlocks
from mergefs.sources.verification import BlockCheck

_LOG = logging.getLogger(__name__)

_KEPT_BYTES = 64 * 2**20
"""For what whole tensors need again for each of their blocks: enough for the factors of several adapters at a time."""

_WHOLE = {
    Purpose.EXPERT: os.POSIX_FADV_NORMAL,
    Purpose.EXPERT_AGAIN: os.POSIX_FADV_NORMAL,
    Purpose.BASE: os.POSIX_FADV_NORMAL,
    Purpose.ANALYSIS: os.POSIX_FADV_SEQUENTIAL,
    Purpose.AUXILIARY: os.POSIX_FADV_NORMAL,
}
_IN_PARTS = _WHOLE | dict.fromkeys((Purpose.EXPERT, Purpose.EXPERT_AGAIN), os.POSIX_FADV_RANDOM)
"""Or read-ahead reads half as much again as the budget pays for."""
_FILLING = -1
"""Stands for the advice of a descriptor by which a file is brought into the page cache in order."""

_PAUSES = (0.05, 0.2, 0.5)
"""Seconds to wait before a read that has failed is tried again, each time: whoever maps a mount dies of an error."""

_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOTCONN,
        errno.ESTALE,  # of a network file system, whose files then have to be opened again
        errno.ETIMEDOUT,
    }
)
"""What may be over a moment later."""

_Key = tuple[FileKey, int]


@dataclass(slots=True)
class _OpenFile:
    """A descriptor and how many reads are using it; of one that is ``given_up`` the last of them closes it."""

    descriptor: int
    users: int = 0
    given_up: bool = False


class SourceReader:
    """Reads from source files on behalf of many threads, keeping at most ``open_files`` of them open.

    ``check`` holds blocks of tensors against their hashes; without it they are taken as they come. ``shared`` keeps
    those that others want, too; ``held`` those that are read for analysis, until they are read for the merge.
    """

    def __init__(
        self,
        ledger: Ledger,
        open_files: int = 128,
        check: BlockCheck | None = None,
        shared: SharedBlocks | None = None,
        held: HeldBlocks | None = None,
    ) -> None:
        self._ledger = ledger
        self._check = check
        self._shared = shared
        self._held = held
        self._limit = open_files
        self._lock = threading.Lock()
        self._files: OrderedDict[_Key, _OpenFile] = OrderedDict()
        self._kept = BlockCache(_KEPT_BYTES)
        self._paid: set[tuple[FileKey, int, int]] = set()
        self._filler = PageCacheFiller()
        self._advice = _IN_PARTS

    def of_whole_tensors(self) -> "SourceReader":
        """Return this reader for those who read experts as a whole, so that the system may read ahead for them.

        Files, memory and accounts are the same.
        """
        other = copy.copy(self)
        other._advice = _WHOLE
        return other

    def holding(self, size: int) -> "SourceReader":
        """Return this reader for who goes over tensors several times to learn what nobody knows of them.

        Up to ``size`` bytes of what is read for analysis are held until that tensor is forgotten. Files and accounts
        are the same.
        """
        other = copy.copy(self)
        other._held = HeldBlocks(size)
        other._shared = None  # or no tensor were forgotten until every model that reads its file had said so
        return other

    def read(self, source: SourceFile, offset: int, size: int, purpose: Purpose) -> Raw:
        """Return ``size`` bytes of ``source`` from ``offset``, as a fresh writable array.

        Raises SourceChangedError when the file is not the planned one or has become shorter, SourceReadError when the
        operating system fails.
        """
        return self.read_pieces(source, ((offset, size),), purpose)

    def read_pieces(self, source: SourceFile, pieces: Sequence[tuple[int, int]], purpose: Purpose) -> Raw:
        """Return the bytes of ``pieces`` (offset, size) one after the other, as ``read`` does those of one."""
        total = sum(size for _, size in pieces)
        buffer: Raw = np.empty(total, dtype=np.uint8)
        advice = self._advice[purpose]
        for pause in _PAUSES:
            try:
                self._fill(buffer, source, pieces, advice)
                break
            except SourceReadError as error:
                if not _may_pass(error):
                    raise
                _LOG.warning("%s; trying again", error)
            self._give_up((source.key, advice))
            time.sleep(pause)
        else:
            self._fill(buffer, source, pieces, advice)
        self._ledger.record_read(purpose, total, source.path)
        return buffer

    def _fill(self, buffer: Raw, source: SourceFile, pieces: Sequence[tuple[int, int]], advice: int) -> None:
        """Read the bytes of ``pieces`` into all of ``buffer``."""
        view, done = buffer.data, 0
        file = self._use(source, advice)
        try:
            for offset, size in pieces:
                _fill(view[done : done + size], source, file.descriptor, offset)
                done += size
            _refuse_written(source, os.fstat(file.descriptor))
        finally:
            self._give_back(file)

    def read_tensor(self, shard: Shard, tensor: TensorSource, start: int, stop: int, purpose: Purpose) -> Raw:
        """Return the elements ``start`` to ``stop`` (flat indices) of a tensor of ``shard``, not to be written to.

        Whole blocks among them are checked. Raises the errors of ``read``, and SourceChangedError for a block that is
        not what was analysed.
        """
        shared = self._shared
        # What one alone wants is not kept, nor what an analysis reads, which goes once over everything.
        if shared is None or purpose is Purpose.ANALYSIS or shared.users_of(shard) < 2:
            return self._read_checked(shard, tensor, start, stop, purpose)
        return shared.read(shard, tensor, start, stop, lambda: self._read_checked(shard, tensor, start, stop, purpose))

    def _read_checked(self, shard: Shard, tensor: TensorSource, start: int, stop: int, purpose: Purpose) -> Raw:
        """Read elements from the file unless they are held, and check the whole blocks among them."""
        analysing = purpose is Purpose.ANALYSIS
        if self._held is not None:
            found = self._held.get(shard, tensor, start, stop)
            if found is not None:
                if not analysing and self._held.use(shard, tensor, start):
                    self._ledger.record_use(purpose, found.nbytes, shard.path)
                return found
        itemsize = tensor.dtype.itemsize
        data = self.read(shard, tensor.offset + start * itemsize, (stop - start) * itemsize, purpose)
        if self._check is not None:
            self._check.check(shard, tensor, start, data)
        if self._held is not None and analysing:
            self._held.hold(shard, tensor, start, data)
        return data

    def read_kept(self, shard: Shard, tensor: TensorSource, purpose: Purpose) -> Raw:
        """Return all of a tensor as an array that must not be written to, from memory while it is kept there.

        Bytes of experts that have to be read for a second time count as read again. Raises what ``read_tensor`` does.
        """
        key = (shard.key, tensor.offset, tensor.nbytes)

        def read() -> Raw:
            counted = purpose
            if purpose in (Purpose.EXPERT, Purpose.EXPERT_AGAIN):
                with self._lock:
                    counted = Purpose.EXPERT_AGAIN if key in self._paid else Purpose.EXPERT
                    self._paid.add(key)
            data = self._read_checked(shard, tensor, 0, tensor.nbytes // tensor.dtype.itemsize, counted)
            data.flags.writeable = False
            return data

        return self._kept.get(key, read)

    def forget(self, shard: Shard, tensor: TensorSource) -> None:
        """Hold nothing of a tensor any longer, when all that merge it have said so."""
        if self._held is not None:
            users = 1 if self._shared is None else self._shared.users_of(shard)
            self._held.forget(shard, tensor, users)

    def will_read(self, shard: Shard, tensor: TensorSource, start: int, stop: int) -> None:
        """Have the system hold elements that are going to be read, unless they are held here.

        It is read for that what the system does not hold, on nobody's account: whoever reads it pays for it then.
        Errors are left to them, too.
        """
        if self._held is not None and self._held.has(shard, tensor):
            return
        itemsize = tensor.dtype.itemsize
        begin, end = tensor.offset + start * itemsize, tensor.offset + stop * itemsize
        with suppress(MergefsError, OSError), self._borrow(shard, _FILLING) as descriptor:
            self._filler.fill(shard.key, descriptor, begin, end)

    @contextmanager
    def lend(self, source: SourceFile) -> Iterator[int]:
        """Lend a descriptor of a file that has been read before, for the system to take bytes from.

        Raises SourceChangedError, also behind its use, when the file was written to since it was planned; and
        SourceReadError.
        """
        with self._borrow(source, os.POSIX_FADV_NORMAL) as descriptor:
            yield descriptor
            _refuse_written(source, os.fstat(descriptor))

    def close(self) -> None:
        """Close every file. No read may be under way."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1].descriptor)

    @contextmanager
    def _borrow(self, source: SourceFile, advice: int) -> Iterator[int]:
        """Lend an open descriptor that nobody closes meanwhile."""
        file = self._use(source, advice)
        try:
            yield file.descriptor
        finally:
            self._give_back(file)

    def _use(self, source: SourceFile, advice: int) -> _OpenFile:
        """Return an open file that nobody closes until it is given back."""
        key = (source.key, advice)
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
                file.users += 1
                return file
        opened = _OpenFile(_open_checked(source, advice))
        with self._lock:
            file = self._files.setdefault(key, opened)
            self._files.move_to_end(key)
            file.users += 1
        if file is not opened:  # another read was quicker
            os.close(opened.descriptor)
        return file

    def _give_back(self, file: _OpenFile) -> None:
        """Use a file no longer."""
        with self._lock:
            file.users -= 1
            if file.given_up and file.users == 0:
                os.close(file.descriptor)
            if len(self._files) > self._limit:
                self._evict()

    def _give_up(self, key: _Key) -> None:
        """Have the next read open a file anew."""
        with self._lock:
            file = self._files.pop(key, None)
            if file is not None:
                file.given_up = True
                if file.users == 0:
                    os.close(file.descriptor)

    def _evict(self) -> None:
        """Close the longest unused files above the limit; files in use stay."""
        idle = [key for key, file in self._files.items() if file.users == 0]
        for key in idle[: len(self._files) - self._limit]:
            os.close(self._files.pop(key).descriptor)


def _fill(view: memoryview, source: SourceFile, descriptor: int, offset: int) -> None:
    """Read the bytes from ``offset`` on into all of ``view``."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise SourceReadError(
                f"{source.path}: reading {len(view)} bytes at offset {offset} failed: "
                f"{os.strerror(error.errno or 0)}; check the disk that it lies on"
            ) from error
        if count == 0:
            raise SourceChangedError(
                f"{source.path}: ends before byte {offset + len(view)}, which it had when the plan was made; "
                "restore the file, or plan again"
            )
        done += count


def _may_pass(error: SourceReadError) -> bool:
    """Return whether what the operating system failed with may be over a moment later."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSING


def check_unchanged(sources: Iterable[SourceFile]) -> None:
    """Raise SourceChangedError naming the first file that is no longer the one the plan was made from."""
    for source in sources:
        try:
            status = source.path.stat()
        except OSError as error:
            raise _gone(source, error) from error
        _compare(source, status)


def _open_checked(source: SourceFile, advice: int) -> int:
    """Open ``source`` and make sure that it is the file that was planned."""
    try:
        descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _gone(source, error) from error
    try:
        _compare(source, os.fstat(descriptor))
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL if advice == _FILLING else advice)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _compare(source: SourceFile, status: os.stat_result) -> None:
    """Raise SourceChangedError unless ``status`` has the planned fingerprint."""
    found = Fingerprint.of(status)
    if found != source.fingerprint:
        names = ("size", "mtime_ns", "ctime_ns", "inode", "device")
        changed = [name for name in names if getattr(found, name) != getattr(source.fingerprint, name)]
        raise SourceChangedError(
            f"{source.path}: changed since the plan was made ({', '.join(changed)} differ); mount or plan again"
        )


def _refuse_written(source: SourceFile, status: os.stat_result) -> None:
    """Raise SourceChangedError where an open file has been written to since the plan was made.

    A changed name, link or permission does its bytes no harm, and must not end a read that is under way.
    """
    if (status.st_size, status.st_mtime_ns) != (source.fingerprint.size, source.fingerprint.mtime_ns):
        raise SourceChangedError(f"{source.path}: was written to since the plan was made; mount or plan again")


def _gone(source: SourceFile, error: OSError) -> SourceChangedError | SourceReadError:
    """Return the error for a source that cannot be opened."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return SourceChangedError(f"{source.path}: is gone since the plan was made; restore it, or plan again")
    return SourceReadError(
        f"{source.path}: cannot be opened: {os.strerror(error.errno or 0)}; check its permissions and its disk"
    )
