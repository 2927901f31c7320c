"""Memory of a process that lives long and computes in many threads: the C allocator, and Python's collector."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_M_ARENA_MAX: Final = -8
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_KEPT: Final = 32 * 2**20
"""Bytes; the library takes nothing larger."""
_ARENAS: Final = 2
_OBJECTS_BETWEEN_COLLECTIONS: Final = 700
"""As Python has it where nobody has asked for another number."""


def limit_arenas() -> None:
    """Let all threads share two pools of free memory.

    The GNU C library gives each thread one of its own, up to eight for each core, and what a pool has once held of
    blocks stays in it. Elsewhere nothing is done. Call it before there are threads.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def keep_freed_memory(size: int) -> None:
    """Keep up to ``size`` bytes of freed memory for the blocks that come next, in each pool.

    The GNU C library would give a block back to the system as soon as it is freed, and the next one would be pages that
    the system has to clear first. Elsewhere nothing is done.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, size)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


def give_back_freed_memory() -> None:
    """Give the system all pages that nothing lies in, also those between blocks.

    Who has held a great deal for a while, and lives on, would else keep most of it: the GNU C library gives back only
    what is free at the end of a pool. Elsewhere nothing is done.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def made_to_stay() -> Iterator[None]:
    """Let Python look for no garbage while a process makes what it keeps until its end, and never look at that again.

    The plan of a large model has a million objects. Looking through them again and again while they are made takes a
    sixth of the time until a mount is ready, and later a pause for whoever reads, or a twelfth of the processors' time
    that it takes to write a model of a gigabyte. What is made after that is looked at as often as by default, also
    where less was asked for while the process started, and there is little of it at a time: so memory stays bounded,
    whatever cycles there are among it, and whatever large blocks hang on them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    finally:
        if was_enabled:
            gc.enable()
