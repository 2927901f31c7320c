"""What is asked of the operating system to bring bytes to disk, whole and for good. All raise OSError."""

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_FICLONERANGE: Final = 0x4020940D


def write_all(descriptor: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write all of ``data``, at ``offset`` or where the file is: the system may take less at once."""
    view = memoryview(data)
    while view:
        count = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset = None if offset is None else offset + count


def read_all(descriptor: int, size: int, offset: int) -> bytes:
    """Return ``size`` bytes from ``offset``, fewer where the file ends: the system may give less at once."""
    pieces = []
    while size and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        size -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def fill(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from ``offset`` and return how much there was: the system may give less at once."""
    done = 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return done


def share(source: int, source_offset: int, destination: int, offset: int, size: int) -> None:
    """Let a range of one file consist of the same blocks on disk as one of another file, until either is written to.

    Blocks of the source that are only in memory are written first. Fails, and leaves the range to be written, unless
    both lie in one file system that can do that and all numbers are multiples of its block size.
    """
    fcntl.ioctl(destination, _FICLONERANGE, struct.pack("=qQQQ", source, source_offset, size, offset))


def sync(descriptor: int) -> None:
    """Make a file's content durable, and its size."""
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> None:
    """Swap two directories in one step (renameat2 with RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "this system cannot exchange directories in one step")
    if libc.renameat2(_AT_FDCWD, bytes(first), _AT_FDCWD, bytes(second), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
