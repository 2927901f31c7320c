"""The C library's allocator, set up for a process that lives long and computes in many threads."""

import ctypes
from contextlib import suppress
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
