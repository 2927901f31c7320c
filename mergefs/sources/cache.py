"""A cache of blocks of bytes: bounded, and each block is read or computed once however many readers want it."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass

from mergefs.kernels.precision import Raw


@dataclass(frozen=True, slots=True)
class CacheTotals:
    """What a cache holds (bytes; of sources alone, too) and what it has done (look-ups).

    Look-ups are those of blocks that readers ask for; ``source_cache_hits`` are those of sources that were found.
    """

    cache_bytes: int
    cache_hits: int
    cache_misses: int
    source_cache_bytes: int
    source_cache_hits: int


@dataclass(slots=True)
class _Source:
    """A block of a source, and how many of its users have not had it so far."""

    block: Raw
    wanted: int


class BlockCache:
    """Keeps the most recently used blocks, at most ``capacity`` bytes of them.

    Blocks of sources are kept for other users than the one that had them read, in half of the capacity at most: what
    was computed from them is smaller, and is what readers ask for again.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._blocks: OrderedDict[Hashable, Raw] = OrderedDict()
        self._sources: OrderedDict[Hashable, _Source] = OrderedDict()
        self._under_way: dict[Hashable, Future[Raw]] = {}
        self._waiting: Counter[Hashable] = Counter()
        self._size = 0
        self._source_size = 0
        self._hits = 0
        self._misses = 0
        self._source_hits = 0

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
            promise, mine = self._claim(key)
            self._misses += mine
            self._hits += not mine
        return self._fulfil(key, promise, compute, self._keep) if mine else promise.result()

    def prepare(self, key: Hashable, compute: Callable[[], Raw]) -> None:
        """Have the block of ``key`` kept before anybody asks for it, unless it is, or is being computed.

        It is no look-up. An error of ``compute`` reaches the caller, and who asks for the block meanwhile.
        """
        with self._lock:
            if key in self._blocks or key in self._under_way:
                return
            promise, _ = self._claim(key)
        self._fulfil(key, promise, compute, self._keep)

    def get_source(self, key: Hashable, read: Callable[[], Raw], users: int) -> Raw:
        """Return a block of a source that ``users`` want once each, as ``get`` does; it goes when all have had it.

        Its keys must be others than those of ``get``.
        """
        with self._lock:
            source = self._sources.get(key)
            if source is not None:
                self._sources.move_to_end(key)
                self._source_hits += 1
                source.wanted -= 1
                if source.wanted <= 0:
                    self._drop_source(key)
                return source.block
            promise, mine = self._claim(key)
            if not mine:
                self._source_hits += 1
                self._waiting[key] += 1
        if not mine:
            return promise.result()
        return self._fulfil(key, promise, read, lambda key, block: self._keep_source(key, block, users - 1))

    def clear(self) -> int:
        """Drop all blocks and return how many bytes they had. Who waits for one gets it all the same."""
        with self._lock:
            dropped = self._size + self._source_size
            self._blocks.clear()
            self._sources.clear()
            self._size = self._source_size = 0
        return dropped

    def totals(self) -> CacheTotals:
        """Return size and counts at one moment."""
        with self._lock:
            return CacheTotals(
                cache_bytes=self._size + self._source_size,
                cache_hits=self._hits,
                cache_misses=self._misses,
                source_cache_bytes=self._source_size,
                source_cache_hits=self._source_hits,
            )

    def _claim(self, key: Hashable) -> tuple[Future[Raw], bool]:
        """Return the promise of a block, and whether it is the caller who has to fulfil it."""
        promise = self._under_way.get(key)
        if promise is not None:
            return promise, False
        promise = self._under_way[key] = Future()
        return promise, True

    def _fulfil(
        self, key: Hashable, promise: Future[Raw], make: Callable[[], Raw], keep: Callable[[Hashable, Raw], None]
    ) -> Raw:
        """Make a block, keep it, and give it to all that wait for it."""
        try:
            block = make()
        except BaseException as error:
            with self._lock:
                del self._under_way[key]
                self._waiting.pop(key, None)
            promise.set_exception(error)
            raise
        with self._lock:
            del self._under_way[key]
            keep(key, block)
            self._shrink()
        promise.set_result(block)
        return block

    def _keep(self, key: Hashable, block: Raw) -> None:
        """Add a block."""
        self._blocks[key] = block
        self._size += block.nbytes

    def _keep_source(self, key: Hashable, block: Raw, wanted: int) -> None:
        """Add a block of a source, unless all that want it are there already."""
        wanted -= self._waiting.pop(key, 0)
        if wanted > 0:
            self._sources[key] = _Source(block, wanted)
            self._source_size += block.nbytes

    def _drop_source(self, key: Hashable) -> None:
        """Keep a block of a source no longer."""
        self._source_size -= self._sources.pop(key).block.nbytes

    def _shrink(self) -> None:
        """Drop what was not used longest until the capacity is kept, and sources have no more than half of it."""
        while self._source_size > self._capacity // 2:
            self._drop_source(next(iter(self._sources)))
        while self._size + self._source_size > self._capacity:
            self._size -= self._blocks.popitem(last=False)[1].nbytes
