"""Memory of a process that lives long and computes in many threads: the C allocator, and Python's collector."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2


def limit_arenas() -> None:
    """Let all threads share two pools of free memory.

    The GNU C library gives each thread one of its own, up to eight for each core, and what a pool has once held of
    blocks stays in it. Elsewhere nothing is done. Call it before there are threads.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


@contextmanager
def made_to_stay() -> Iterator[None]:
    """Let Python look for no garbage while a process makes what it keeps until its end, and never look at that again.

    The plan of a large model has a million objects. Looking through them again and again while they are made takes a
    sixth of the time until a mount is ready, and later a pause for whoever reads.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
