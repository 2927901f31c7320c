"""Computes what sequential readers of a mount are about to ask for, before they do.

``SequentialReads`` recognises them by the ranges that they read; ``ReadingAhead`` has the next blocks computed into the
engine's cache, where a reader finds them or waits for the one that is under way.

Readers come first without any order of precedence: a reader never waits for a block that has not begun, but computes it
itself, and blocks that are computed ahead are no more at a time than there are processors. So at most as much of the
engine's memory to work in is lent to them, by the same rules as to readers.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from mergefs.processors import usable_processors

_LOG = logging.getLogger(__name__)

RECOGNISED_AFTER: Final = 2 * 2**20
"""Bytes, two blocks of a 16 bit type, that are read in order before anything is computed ahead."""
REQUESTS: Final = 6
"""So many at least: a few large ones lie side by side by chance, too."""
LARGEST_WINDOW: Final = 32 * 2**20
"""Bytes that are computed ahead of one reader at most: enough for the processors to be busy while it takes some."""
SHARE_OF_CACHE: Final = 4
"""All readers' windows together are at most one in so many bytes of the cache: else one's would push out another's."""
RUNS: Final = 4
"""Places of one file that may be read on from by turns: loaders read several tensors of a mapped file side by side."""
_BROUGHT_IN: Final = 2**20
"""Bytes of a file whose inputs are read ahead of its readers at a time."""
_STRAYING: Final = 8
"""Requests that one may be early or late by: the kernel sends them in order, and several threads receive them."""
_FARTHEST_STRAYING: Final = 2 * 2**20
"""Bytes that it may be early or late by at most."""


class FileBlocks(Protocol):
    """The blocks that a file of ``size`` bytes is computed by. Safe to share between threads."""

    @property
    def size(self) -> int:
        """The bytes of the file."""

    def end_of(self, position: int) -> int:
        """Return where the block ends that has the byte at ``position``, which lies in the file."""

    def reach(self, begin: int, end: int) -> int:
        """Return how far may be computed ahead of a reader that has read from ``begin`` to ``end`` so far."""

    def will_read(self, begin: int, end: int) -> None:
        """Have the system hold what a range is computed from."""

    def compute(self, position: int) -> None:
        """Have the block that has the byte at ``position`` in the cache, unless it is a copy of a source's."""


@dataclass(slots=True, eq=False)
class Run:
    """Ranges of a file that follow one another: so many ``requests`` for ``amount`` bytes from ``begin`` to ``end``.

    Blocks before ``asked`` need not be asked for any more, ``window`` bytes after ``end`` may be. Nothing is computed
    for a run that is ``over``.
    """

    begin: int
    end: int
    amount: int
    requests: int = 1
    asked: int = 0
    window: int = RECOGNISED_AFTER
    over: bool = False

    @property
    def is_sequential(self) -> bool:
        """Whether enough of it has been read, not by chance, and with no more left out than read."""
        passed = self.end - self.begin
        return passed >= RECOGNISED_AFTER and self.requests >= REQUESTS and self.amount >= passed // 2


class SequentialReads:
    """Recognises who reads one open file from front to end, from the ranges that the kernel asks for.

    Ranges may come a few requests too early or too late. What is read anywhere else begins a run of its own, and of
    these ``RUNS`` are remembered: so who reads at random, or backwards, never gets far in one. Not safe to share
    between threads.
    """

    def __init__(self) -> None:
        self._runs: list[Run] = []  # what was read last is the last

    @property
    def sequential(self) -> int:
        """How many readers are recognised at the moment."""
        return sum(run.is_sequential and not run.over for run in self._runs)

    def take(self, offset: int, size: int) -> Run | None:
        """Take in that a range is read, and return the run that it continues where that is sequential."""
        end = offset + size
        straying = min(_STRAYING * size, _FARTHEST_STRAYING)
        for place in range(len(self._runs) - 1, -1, -1):
            run = self._runs[place]
            if run.end - straying <= end and offset <= run.end + straying:
                self._runs.append(self._runs.pop(place))
                run.end = max(run.end, end)
                run.amount += size
                run.requests += 1
                return run if run.is_sequential and not run.over else None
        self._runs.append(Run(offset, end, size))
        if len(self._runs) > RUNS:
            self._runs.pop(0).over = True
        return None

    def end(self) -> None:
        """Let nothing be computed for any of it any more."""
        for run in self._runs:
            run.over = True
        self._runs.clear()


class ReadingAhead:
    """What is computed ahead of all readers of a mount, within a share of a cache of ``cache_size`` bytes."""

    def __init__(self, cache_size: int) -> None:
        self._share = cache_size // SHARE_OF_CACHE
        self._lock = threading.Lock()
        self._readers = 0
        self._pool = ThreadPoolExecutor(usable_processors(), thread_name_prefix="ahead")

    def watch(self, blocks: FileBlocks) -> "WatchedFile":
        """Return what is to be told of each range that is read through one open file."""
        return WatchedFile(blocks, self)

    def window(self) -> int:
        """Return the bytes that may be computed ahead of each reader now: the fewer, the more there are."""
        return min(LARGEST_WINDOW, self._share // max(self._readers, 1))

    def count(self, change: int) -> None:
        """Take in that so many more readers are sequential than before."""
        with self._lock:
            self._readers += change

    def start(self, work: Callable[[], None]) -> None:
        """Do ``work`` when a thread is free for it."""
        self._pool.submit(work)

    def close(self) -> None:
        """Begin nothing more, and wait for what is under way. No file may be read any more."""
        self._pool.shutdown(cancel_futures=True)


class WatchedFile:
    """One open file, ahead of whose readers blocks are computed. Safe to share between threads."""

    def __init__(self, blocks: FileBlocks, ahead: ReadingAhead) -> None:
        self._blocks = blocks
        self._ahead = ahead
        self._lock = threading.Lock()
        self._reads = SequentialReads()
        self._counted = 0
        self._last: Run | None = None

    def reads(self, offset: int, size: int) -> None:
        """Take in that a range, which lies in the file, is being read; let what follows be computed if it is due."""
        with self._lock:
            run = self._reads.take(offset, size)
            if run is not None and run.end >= self._blocks.size:
                run.over = True
            if run is not self._last or (run is not None and run.over):  # else nothing has changed but places
                self._last = run
                self._count(self._reads.sequential)
            if run is not None and not run.over:
                self._extend(run)

    def close(self) -> None:
        """Begin nothing more for this file."""
        with self._lock:
            self._reads.end()
            self._count(0)

    def _count(self, sequential: int) -> None:
        """Tell how many of its readers are sequential."""
        if sequential != self._counted:
            self._ahead.count(sequential - self._counted)
            self._counted = sequential

    def _extend(self, run: Run) -> None:
        """Ask for the blocks of a run's window, as soon as half of those that were asked for before have been read.

        The window begins small, and doubles each time: who stops early leaves little that was computed in vain.
        """
        lead = run.asked - run.end
        if lead > run.window // 2:
            return
        largest = self._ahead.window()
        run.window = window = min(2 * run.window if lead > 0 else run.window, largest)
        reach = self._blocks.reach(run.begin, run.end)
        begin = max(run.asked, self._blocks.end_of(run.end - 1))
        position, wanted = begin, []
        while position < min(run.end + window, reach):
            end = self._blocks.end_of(position)
            if end > run.end + largest:
                break
            wanted.append(position)
            position = end
        if not wanted:
            return
        run.asked = position
        self._ahead.start(partial(self._bring_in, run, begin, position))
        for block in wanted:
            self._ahead.start(partial(self._compute, run, block))

    def _bring_in(self, run: Run, begin: int, end: int) -> None:
        """Have what the blocks from ``begin`` to ``end`` are computed from read, as long as the reader is there.

        Little at a time: a disk may be slow, and who unmounts waits for what is under way.
        """
        for position in range(begin, end, _BROUGHT_IN):
            if run.over:
                return
            self._blocks.will_read(position, min(position + _BROUGHT_IN, end))

    def _compute(self, run: Run, position: int) -> None:
        """Compute the block that begins at ``position``, unless its reader is at it already, or gone.

        An error ends the run: whoever reads the block meets it too, and there it is told.
        """
        if run.over or position < run.end:
            return
        try:
            self._blocks.compute(position)
        except Exception as error:
            run.over = True
            _LOG.debug("nothing more is computed ahead of a reader: %s", error)
