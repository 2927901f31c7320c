"""What of a weight file is on disk for good: it is synced every so often, and then the journal told."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from itertools import pairwise
from typing import Final

from mergefs.materialize.journal import Journal, Part, Read
from mergefs.materialize.output import Output

SYNC_BYTES: Final = 64 * 2**20
"""What a loss of power may cost: after so many bytes a file is synced, and what is then on disk written down."""


class Durability:
    """Syncs one file in the only thread of ``syncing``, and tells the journal what is on disk then."""

    def __init__(
        self, output: Output, name: str, journal: Journal, syncing: Executor, spent: Callable[[], Read]
    ) -> None:
        self._output = output
        self._name = name
        self._journal = journal
        self._syncing = syncing
        self._spent = spent
        self._parts: list[Part] = []
        self._bytes = 0
        self._running: Future[None] | None = None

    def add(self, cuts: Sequence[int], hashes: Sequence[str]) -> None:
        """Take over the parts of a file between ``cuts``, which have been written. Raises OSError of earlier syncs."""
        for (begin, end), found in zip(pairwise(cuts), hashes, strict=True):
            self._parts.append(Part(self._name, begin, end - begin, found))
        self._bytes += cuts[-1] - cuts[0]
        if self._bytes >= SYNC_BYTES:
            self.wait()
            self.begin_sync()

    def begin_sync(self) -> None:
        """Let everything that was added be made durable in the background; ``wait`` says when that is done."""
        self._running = self._syncing.submit(self._sync, tuple(self._parts))
        self._parts, self._bytes = [], 0

    def wait(self) -> None:
        """Wait for the sync that is under way. Raises OSError."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def save(self) -> None:
        """Make durable what can be, after an error: an interruption or a full disk then costs nothing of it."""
        with suppress(OSError):
            self.wait()
            self._sync(tuple(self._parts))

    def _sync(self, parts: tuple[Part, ...]) -> None:
        """Sync, and then write down what that has made durable."""
        self._output.sync()
        if parts:
            self._journal.append([*parts, self._spent()])
