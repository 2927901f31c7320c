"""A cache of blocks of bytes: bounded, and each block is read or computed once however many readers want it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass

from mergefs.kernels.precision import Raw


@dataclass(frozen=True, slots=True)
class CacheTotals:
    """What a cache holds (bytes) and what it has done (look-ups)."""

    cache_bytes: int
    cache_hits: int
    cache_misses: int


class BlockCache:
    """Keeps the most recently used blocks, at most ``capacity`` bytes of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._blocks: OrderedDict[Hashable, Raw] = OrderedDict()
        self._under_way: dict[Hashable, Future[Raw]] = {}
        self._size = 0
        self._hits = 0
        self._misses = 0

    def get(self, key: Hashable, compute: Callable[[], Raw]) -> Raw:
        """Return the block of ``key``, by ``compute`` when it is neither kept nor being computed by another thread.

        An error of ``compute`` reaches every reader that waits for the block; nothing is kept of it.
        """
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
                self._hits += 1
                return block
            future = self._under_way.get(key)
            if future is None:
                self._misses += 1
                mine: Future[Raw] = Future()
                self._under_way[key] = mine
            else:
                self._hits += 1
        if future is not None:
            return future.result()
        try:
            block = compute()
        except BaseException as error:
            with self._lock:
                del self._under_way[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._under_way[key]
            self._keep(key, block)
        mine.set_result(block)
        return block

    def totals(self) -> CacheTotals:
        """Return size and counts at one moment."""
        with self._lock:
            return CacheTotals(self._size, self._hits, self._misses)

    def _keep(self, key: Hashable, block: Raw) -> None:
        """Add a block and drop the least recently used ones until the capacity is kept."""
        self._blocks[key] = block
        self._size += block.nbytes
        while self._size > self._capacity:
            self._size -= self._blocks.popitem(last=False)[1].nbytes
