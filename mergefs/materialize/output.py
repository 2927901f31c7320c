"""Files of a model that is being written, and memory that they are written from.

Weights go to the disk from the memory that they were computed in, past the page cache, where the file system can do
that (``O_DIRECT``): no processor copies them, and what the cache holds of the inputs stays there. Where it cannot, and
for what does not fill a page at the end of a file, the page cache takes them as usual.
"""

import errno
import mmap
import os
import queue
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from blake3 import blake3

from mergefs.errors import MaterializeError
from mergefs.materialize.manifest import FileEntry
from mergefs.materialize.system import fill, share, sync, sync_directory, write_all

_ALIGNMENT: Final = 4096
"""Offsets, sizes and addresses that every disk takes directly are multiples of it."""


class Buffers:
    """Lends ``count`` pieces of memory of ``size`` bytes, which begin with a page."""

    def __init__(self, count: int, size: int) -> None:
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(count):
            # In large pages, which are few to pin and to hand on: the disk then takes up to twice as much in a second.
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # of a kernel that has none
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._free.put(memoryview(memory))

    def take(self) -> memoryview:
        """Return one of them, as soon as one is free."""
        return self._free.get()

    def give_back(self, buffer: memoryview) -> None:
        """Take one back."""
        self._free.put(buffer)


class Output:
    """A weight file that is written in any order, by many threads."""

    def __init__(self, path: Path, size: int) -> None:
        """Open ``path``, whatever is there of it, and cut off what is beyond ``size`` bytes. Raises OSError."""
        self.path = path
        self._direct: int | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            sync_directory(path.parent)  # so that the name is there as soon as pieces are
            self.block_size = max(os.fstatvfs(self._descriptor).f_bsize, _ALIGNMENT)
            if os.fstat(self._descriptor).st_size > size:
                os.ftruncate(self._descriptor, size)
            with suppress(OSError):  # of a file system that has no such thing
                self._direct = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECT)
        except BaseException:
            self.close()
            raise

    def read(self, view: memoryview, offset: int) -> bool:
        """Fill ``view`` with what lies at ``offset``; return whether the file has so much. Raises OSError."""
        return fill(self._descriptor, view, offset) == len(view)

    def share(self, source: int, source_offset: int, begin: int, end: int) -> None:
        """Let ``begin`` to ``end`` be what lies in another file, in whole blocks. Raises OSError."""
        share(source, source_offset, self._descriptor, begin, end - begin)

    def write(self, view: memoryview, offset: int, there: Sequence[tuple[int, int]] = ()) -> None:
        """Write ``view``, which begins with a page of memory, at ``offset``. Raises OSError.

        The ranges of the file that are ``there`` already, in order and of whole blocks, are left out.
        """
        position, end = offset, offset + len(view)
        for begin, stop in (*there, (end, end)):
            if position < begin:
                self._write(view[position - offset : begin - offset], position)
            position = stop

    def _write(self, view: memoryview, offset: int) -> None:
        done = self._write_directly(view[: len(view) // _ALIGNMENT * _ALIGNMENT], offset)
        if done < len(view):
            write_all(self._descriptor, view[done:], offset + done)

    def _write_directly(self, view: memoryview, offset: int) -> int:
        """Write past the page cache, and return how much: all or nothing."""
        if self._direct is None or not view or offset % _ALIGNMENT:
            return 0
        try:
            write_all(self._direct, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0
        return len(view)

    def sync(self) -> None:
        """Make durable what has been written. Raises OSError."""
        sync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)


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
        raise failed(path, 0, error) from error
    return FileEntry(len(data), blake3(data).hexdigest())


def failed(path: Path, done: int, error: OSError) -> MaterializeError:
    """Return the error for a disk that takes no more."""
    return MaterializeError(
        f"{path}: writing failed after {done} bytes ({error.strerror}); free space or repair the disk, and run again "
        "with --resume, or choose another place: the destination is as it was"
    )
