"""What all merged models of one process share: catalog, reader, ledger, cache, and memory to work in."""

from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from mergefs.catalog.catalog import Catalog
from mergefs.engine.room import Room
from mergefs.sources.cache import BlockCache
from mergefs.sources.holding import HeldBlocks
from mergefs.sources.ledger import Ledger
from mergefs.sources.reader import SourceReader
from mergefs.sources.sharing import SharedBlocks
from mergefs.sources.verification import BlockCheck
from mergefs.statistics.contents import learned_hashes
from mergefs.statistics.identity import known_blocks
from mergefs.statistics.service import StatisticsService

DEFAULT_CACHE_SIZE: Final = 2**30
SMALLEST_CACHE_SIZE: Final = 64 * 2**20
"""Room for the blocks that parallel readers are in the middle of; with less, each would be computed again and again."""
WORKING_MEMORY: Final = 64 * 2**20
"""For blocks that are being computed: enough for a dozen at once of three experts and their base."""
PLANNING_MEMORY: Final = 2 * 2**30
"""For all that planning takes, where nothing else is said."""
_WORKERS: Final = 32
"""Blocks that may be computed at once: more than there are cores, since most wait where sources lie on a slow disk."""

_Resources = TypeVar("_Resources", bound="Resources")


@dataclass(frozen=True, slots=True)
class Resources:
    """Shared by every engine of a process.

    ``room`` is the memory in which blocks are computed, ``held_size`` what is held of tensors that are analysed,
    ``planning_size`` what planning may take of memory;
    ``learns`` says whether hashes of what is read are kept where nobody knows them.
    """

    catalog: Catalog
    ledger: Ledger
    reader: SourceReader
    cache: BlockCache
    shared: SharedBlocks
    statistics: StatisticsService
    room: Room
    held_size: int
    planning_size: int
    learns: bool

    @classmethod
    def create(
        cls: type[_Resources],
        catalog: Catalog,
        cache_size: int = DEFAULT_CACHE_SIZE,
        verify_reads: bool = True,
        held_size: int = 0,
        planning_size: int = PLANNING_MEMORY,
    ) -> _Resources:
        """Return resources with a ledger and a cache of their own.

        ``verify_reads`` holds every block that is read against its hash, where an analysis has kept one. Who reads all
        of a merge once, from its beginning to its end, gives a ``held_size``: so many bytes that are read for analysis
        are held until they are merged, and what is read then tells the hashes of tensors that have none. It flushes the
        catalog, too: what is found out of single tensors is not written one by one.
        """
        ledger = Ledger()
        learned = learned_hashes(catalog) if held_size else None
        check = BlockCheck(partial(known_blocks, catalog=catalog), learned) if verify_reads else None
        cache = BlockCache(cache_size)
        shared = SharedBlocks(cache)
        held = HeldBlocks(held_size) if held_size else None
        reader = SourceReader(ledger, check=check, shared=shared, held=held)
        return cls(
            catalog=catalog,
            ledger=ledger,
            reader=reader,
            cache=cache,
            shared=shared,
            statistics=StatisticsService(catalog, reader, at_once=not held_size),
            room=Room(WORKING_MEMORY, _WORKERS),
            held_size=held_size,
            planning_size=planning_size,
            learns=learned is not None and verify_reads,
        )

    def close(self) -> None:
        """Close files and catalog."""
        self.reader.close()
        self.catalog.close()
