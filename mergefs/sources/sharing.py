"""Blocks of sources that several merged models of one process read: each is read once for all of them."""

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable

from mergefs.checkpoint.checkpoint import TensorSource
from mergefs.checkpoint.source import AuxiliaryFile, FileKey, Shard
from mergefs.kernels.precision import Raw
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.cache import BlockCache


class SharedBlocks:
    """Keeps blocks of files that more than one user reads in ``cache``. Safe to share between threads.

    A file that one user alone reads passes by: that user keeps what it has computed, and needs the sources no more.
    """

    def __init__(self, cache: BlockCache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._users: Counter[FileKey] = Counter()
        self._gone: deque[frozenset[FileKey]] = deque()
        self._added = 0

    def add_user(self, user: object, files: Iterable[Shard | AuxiliaryFile]) -> int:
        """Note that ``user`` reads ``files`` as long as it lives, and return its number, from 0 on."""
        read = frozenset(file.key for file in files)
        with self._lock:
            self._users.update(read)
            number, self._added = self._added, self._added + 1
        # Whenever the collector comes, whoever holds which lock: so that is only noted.
        weakref.finalize(user, self._gone.append, read).atexit = False
        return number

    def _users_of(self, file: FileKey) -> int:
        """Return how many read a file."""
        if self._gone:
            with self._lock:
                while self._gone:
                    self._users -= Counter(self._gone.popleft())
        return self._users[file]

    def users_of(self, shard: Shard) -> int:
        """Return how many read a file."""
        return self._users_of(shard.key)

    def read(self, shard: Shard, tensor: TensorSource, start: int, stop: int, read: Callable[[], Raw]) -> Raw:
        """Return the elements ``start`` to ``stop`` of a tensor, by ``read`` where they are not kept.

        Whole blocks are kept, and nothing else: there would be too many pieces. What is kept must not be written to.
        """
        users = self._users_of(shard.key)
        if users < 2 or not _is_block(tensor, start, stop):
            return read()

        def read_to_keep() -> Raw:
            data = read()
            data.flags.writeable = False
            return data

        return self._cache.get_source(("source", shard.key, tensor.offset, start), read_to_keep, users)


def _is_block(tensor: TensorSource, start: int, stop: int) -> bool:
    """Return whether a run of elements is one block of a tensor."""
    grid = BlockGrid.of(tensor.shape)
    return start % grid.step == 0 and start < stop == min(start + grid.step, grid.size)
