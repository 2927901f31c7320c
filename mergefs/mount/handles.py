"""The files of a tree that are open."""

import errno
import threading
from collections import Counter

from mergefs.mount.shown import ReadRange, ShownDirectory


class Handles:
    """Numbers for open files. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, tuple[ShownDirectory, ReadRange]] = {}
        self._users: Counter[int] = Counter()
        self._next = 1

    def open(self, directory: ShownDirectory, path: str) -> int:
        """Open the file ``path`` of ``directory`` and return a handle for it."""
        read = directory.open(path)
        with self._lock:
            handle = self._next
            self._next += 1
            self._open[handle] = (directory, read)
            self._users[id(directory)] += 1
        return handle

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``: fewer only where the file ends."""
        found = self._open.get(handle)
        if found is None:
            raise OSError(errno.EBADF, "no such handle")
        return found[1](offset, size)

    def release(self, handle: int) -> None:
        """Give ``handle`` back."""
        with self._lock:
            found = self._open.pop(handle, None)
            if found is not None:
                self._users -= Counter((id(found[0]),))

    def in_use(self, directory: ShownDirectory) -> bool:
        """Return whether some file of ``directory`` is open."""
        with self._lock:
            return self._users[id(directory)] > 0
