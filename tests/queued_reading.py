"""Reading ahead whose work is done when a test says so."""

from collections.abc import Callable

from mergefs.mount.reading_ahead import ReadingAhead


class Queued(ReadingAhead):
    """Work that is done when the test says so."""

    def __init__(self, cache_size: int = 2**30) -> None:
        super().__init__(cache_size)
        self.queue: list[Callable[[], None]] = []

    def start(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def work(self) -> None:
        while self.queue:
            self.queue.pop(0)()
