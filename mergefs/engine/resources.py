"""What all merged models of one process share: catalog, reader, ledger, cache, and memory to work in."""

from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from mergefs.catalog.catalog import Catalog
from mergefs.engine.room import Room
from mergefs.sources.cache import BlockCache
from mergefs.sources.ledger import Ledger
from mergefs.sources.reader import SourceReader
from mergefs.sources.sharing import SharedBlocks
from mergefs.sources.verification import BlockCheck
from mergefs.statistics.identity import known_blocks
from mergefs.statistics.service import StatisticsService

DEFAULT_CACHE_SIZE: Final = 2**30
SMALLEST_CACHE_SIZE: Final = 64 * 2**20
"""Room for the blocks that parallel readers are in the middle of; with less, each would be computed again and again."""
_WORKING_MEMORY: Final = 64 * 2**20
"""For blocks that are being computed: enough for a dozen at once of three experts and their base."""
_WORKERS: Final = 32
"""Blocks that may be computed at once: more than there are cores, since most wait where sources lie on a slow disk."""

_Resources = TypeVar("_Resources", bound="Resources")


@dataclass(frozen=True, slots=True)
class Resources:
    """Shared by every engine of a process. ``room`` is the memory in which blocks are computed."""

    catalog: Catalog
    ledger: Ledger
    reader: SourceReader
    cache: BlockCache
    shared: SharedBlocks
    statistics: StatisticsService
    room: Room

    @classmethod
    def create(
        cls: type[_Resources], catalog: Catalog, cache_size: int = DEFAULT_CACHE_SIZE, verify_reads: bool = True
    ) -> _Resources:
        """Return resources with a ledger and a cache of their own.

        ``verify_reads`` holds every block that is read against its hash, where an analysis has kept one.
        """
        ledger = Ledger()
        check = BlockCheck(partial(known_blocks, catalog=catalog)) if verify_reads else None
        cache = BlockCache(cache_size)
        shared = SharedBlocks(cache)
        reader = SourceReader(ledger, check=check, shared=shared)
        return cls(
            catalog=catalog,
            ledger=ledger,
            reader=reader,
            cache=cache,
            shared=shared,
            statistics=StatisticsService(catalog, reader),
            room=Room(_WORKING_MEMORY, _WORKERS),
        )

    def close(self) -> None:
        """Close files and catalog."""
        self.reader.close()
        self.catalog.close()
