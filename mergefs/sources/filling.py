"""Brings source files into the page cache ahead of who reads them: in order, in one stream for each file.

So the disk works without a pause, and the system keeps the file in large pages. What is asked for by
``POSIX_FADV_WILLNEED``, or read in the wrong order, comes in pages of 4 KiB instead: every later read of it, by any
program, then takes up to three times as long.
"""

import os
import threading
from collections.abc import Hashable
from contextlib import suppress
from typing import Final

from mergefs.sources.page_cache import cached_pages

_STEP: Final = 2**20
"""Bytes that are read at a time. They are of no use here: the next ones take their place in the processor's cache."""
_BEYOND: Final = 48 * 2**20
"""Bytes behind a range at which the system has read nothing by itself: its windows are 16 MiB long at most on most
machines. What lies there in the cache was there before."""
_TRUSTED: Final = 24 * 2**20
"""Bytes behind a range of which what was found there is believed, too, so that not every range asks the system."""


class PageCacheFiller:
    """Fills the page cache with ranges of files that somebody is about to read. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._missing_until: dict[Hashable, int] = {}
        self._present: dict[Hashable, tuple[int, int]] = {}
        self._never_kept: set[Hashable] = set()

    def fill(self, key: Hashable, descriptor: int, begin: int, end: int) -> None:
        """Have the bytes ``begin`` to ``end`` of a file in the cache, which ``key`` stands for; raises OSError.

        Nothing is read where it lies there already, nor twice from a file that the system keeps nothing of. Where the
        system cannot tell, it is asked to read for itself.
        """
        if self._is_full(key, begin, end):
            return
        try:
            missing = self._is_missing(key, descriptor, begin, end)
        except OSError:
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
            return
        if not missing:
            return
        memory = memoryview(bytearray(min(_STEP, end - begin)))
        for position in range(begin, end, _STEP):
            os.preadv(descriptor, [memory[: end - position]], position)
        with suppress(OSError):
            if not cached_pages(descriptor, begin, 1):
                self._never_kept.add(key)

    def _is_full(self, key: Hashable, begin: int, end: int) -> bool:
        """Return whether it is known without asking the system that it holds a range of a file, or keeps nothing."""
        first, last = self._present.get(key, (0, 0))
        return (first <= begin and end <= last) or key in self._never_kept or begin >= end

    def _is_missing(self, key: Hashable, descriptor: int, begin: int, end: int) -> bool:
        """Return whether a range was not in the cache before the system began to read ahead in its file.

        Looking at every page would cost as much as hashing them: one far behind the range speaks for all before it,
        since files come into the cache, and leave it, by long runs of pages.
        """
        last = os.fstat(descriptor).st_size - 1
        far = min(end + _BEYOND, last)
        found = cached_pages(descriptor, far, 1) > 0
        with self._lock:
            until = self._missing_until.get(key, 0)
            if not found:
                until = far + 1
            elif begin >= until and not cached_pages(descriptor, begin, 1):
                until = end
            self._missing_until[key] = until
            if begin >= until:
                self._present[key] = begin, far + 1 if far == last else end + _TRUSTED
            else:
                self._present.pop(key, None)
        return begin < until
