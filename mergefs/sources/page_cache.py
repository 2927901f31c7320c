"""What the system holds of files in memory, without reading any of it: reads are counted, and paid for by budgets."""

import ctypes
import os
from functools import cache
from typing import Any, Final

_CACHESTAT: Final = 451
"""The number of the system call, on every architecture; Linux has it since 6.5."""


class _Range(ctypes.Structure):
    """``struct cachestat_range``: a range of a file, in bytes."""

    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    """``struct cachestat``: how many pages of it there are in the cache, and in which state."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "evicted_lately"))


def cached_pages(descriptor: int, offset: int, size: int) -> int:
    """Return how many pages of a range of an open file lie in the page cache. Raises OSError where nobody can tell."""
    wanted, found = _Range(offset, size), _Pages()
    if _system_call()(_CACHESTAT, descriptor, ctypes.byref(wanted), ctypes.byref(found), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    count: int = found.cached
    return count


@cache
def _system_call() -> Any:
    """Return the function of the C library that makes a system call by its number."""
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    function.restype = ctypes.c_long
    return function
