"""What of a weight file is on disk for good: it is synced every so often, and then the journal told."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from itertools import pairwise
from typing import Final

from mergefs.materialize.journal import Journal, Piece, Read
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
        self._pieces: list[Piece] = []
        self._bytes = 0
        self._running: Future[None] | None = None

    def add(self, first: int, hashes: Sequence[str], bounds: Sequence[int], size: int) -> None:
        """Take over ``size`` bytes that have been written, with which pieces from number ``first`` on are whole.

        ``bounds`` are where each of these begins, and where the last one ends. Raises OSError of earlier syncs.
        """
        for index, (found, (begin, end)) in enumerate(zip(hashes, pairwise(bounds), strict=True)):
            self._pieces.append(Piece(self._name, first + index, found, end - begin))
        self._bytes += size
        if self._bytes >= SYNC_BYTES:
            self.wait()
            self.begin_sync()

    def begin_sync(self) -> None:
        """Let everything that was added be made durable in the background; ``wait`` says when that is done."""
        self._running = self._syncing.submit(self._sync, tuple(self._pieces))
        self._pieces, self._bytes = [], 0

    def wait(self) -> None:
        """Wait for the sync that is under way. Raises OSError."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def save(self) -> None:
        """Make durable what can be, after an error: an interruption or a full disk then costs nothing of it."""
        with suppress(OSError):
            self.wait()
            self._sync(tuple(self._pieces))

    def _sync(self, pieces: tuple[Piece, ...]) -> None:
        """Sync, and then write down what that has made durable."""
        self._output.sync()
        if pieces:
            self._journal.append([*pieces, self._spent()])
