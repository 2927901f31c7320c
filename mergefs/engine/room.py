"""How much is computed at once, however many readers there are."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """Lends memory, of which there is ``capacity`` bytes, to at most ``workers`` threads, and lets the others wait.

    One that alone needs more than there is gets it when nobody else has any.
    """

    def __init__(self, capacity: int, workers: int) -> None:
        self._capacity = capacity
        self._workers = workers
        self._condition = threading.Condition()
        self._lent = 0
        self._working = 0

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Wait until there are ``size`` bytes, and lend them."""
        with self._condition:
            self._condition.wait_for(lambda: self._fits(size))
            self._lent += size
            self._working += 1
        try:
            yield
        finally:
            with self._condition:
                self._lent -= size
                self._working -= 1
                self._condition.notify_all()

    def _fits(self, size: int) -> bool:
        """Return whether ``size`` bytes can be lent now."""
        if self._working == 0:
            return True
        return self._working < self._workers and self._lent + size <= self._capacity
