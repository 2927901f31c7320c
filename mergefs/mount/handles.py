"""The files of a tree that are open."""

import errno
import threading
from collections import Counter
from dataclasses import dataclass

from mergefs.mount.reading_ahead import ReadingAhead, WatchedFile
from mergefs.mount.shown import Opened, ShownDirectory


@dataclass(frozen=True, slots=True)
class _Handle:
    """An open file of ``directory``; ``watched`` where something can be computed ahead of its readers."""

    directory: ShownDirectory
    opened: Opened
    watched: WatchedFile | None


class Handles:
    """Numbers for open files. Safe to share between threads."""

    def __init__(self, ahead: ReadingAhead) -> None:
        self._ahead = ahead
        self._lock = threading.Lock()
        self._open: dict[int, _Handle] = {}
        self._users: Counter[int] = Counter()
        self._next = 1

    def open(self, directory: ShownDirectory, path: str) -> int:
        """Open the file ``path`` of ``directory`` and return a handle for it."""
        opened = directory.open(path)
        watched = None if opened.blocks is None else self._ahead.watch(opened.blocks)
        with self._lock:
            handle = self._next
            self._next += 1
            self._open[handle] = _Handle(directory, opened, watched)
            self._users[id(directory)] += 1
        return handle

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``: fewer only where the file ends."""
        found = self._open.get(handle)
        if found is None:
            raise OSError(errno.EBADF, "no such handle")
        if found.watched is not None and 0 <= offset < found.opened.size and size > 0:
            found.watched.reads(offset, min(size, found.opened.size - offset))
        return found.opened.read(offset, size)

    def release(self, handle: int) -> None:
        """Give ``handle`` back."""
        with self._lock:
            found = self._open.pop(handle, None)
            if found is not None:
                self._users -= Counter((id(found.directory),))
        if found is not None and found.watched is not None:
            found.watched.close()

    def in_use(self, directory: ShownDirectory) -> bool:
        """Return whether some file of ``directory`` is open."""
        with self._lock:
            return self._users[id(directory)] > 0
