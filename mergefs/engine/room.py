"""How much is computed at once, however many readers there are."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Waiting:
    """A thread that waits for ``size`` bytes; ``turn`` is unlocked when they are its own."""

    size: int
    turn: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.turn.acquire()


class Room:
    """Lends memory, of which there is ``capacity`` bytes, to at most ``workers`` threads, and lets the others wait.

    Whoever came first is served first: so nobody waits forever for much memory while others go on taking little, and
    of many that wait only those are woken that go on. One that alone needs more than there is gets it when nobody else
    has any.
    """

    def __init__(self, capacity: int, workers: int) -> None:
        self._capacity = capacity
        self._workers = workers
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._lent = 0
        self._working = 0

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Wait until there are ``size`` bytes, and lend them."""
        waiting = None
        with self._lock:
            if not self._queue and self._fits(size):
                self._lend(size)
            else:
                waiting = _Waiting(size)
                self._queue.append(waiting)
        if waiting is not None:
            try:
                waiting.turn.acquire()
            except BaseException:  # a signal in the main thread
                self._leave(waiting)
                raise
        try:
            yield
        finally:
            with self._lock:
                self._take_back(size)

    def _leave(self, me: _Waiting) -> None:
        """Let somebody go who has waited in vain, or who has been lent memory and does not know."""
        with self._lock:
            if me in self._queue:
                self._queue.remove(me)
                self._serve()
            else:
                self._take_back(me.size)

    def _lend(self, size: int) -> None:
        """Let somebody have memory."""
        self._lent += size
        self._working += 1

    def _take_back(self, size: int) -> None:
        """Add what was lent to what there is."""
        self._lent -= size
        self._working -= 1
        self._serve()

    def _serve(self) -> None:
        """Lend to those who wait, in their order, as far as there is anything."""
        while self._queue and self._fits(self._queue[0].size):
            first = self._queue.popleft()
            self._lend(first.size)
            first.turn.release()

    def _fits(self, size: int) -> bool:
        """Return whether ``size`` bytes can be lent now."""
        if self._working == 0:
            return True
        return self._working < self._workers and self._lent + size <= self._capacity
