"""Gives back the memory of pages of a mapped file that have been read.

What is read through a map stays in the resident set of the process, though the kernel could drop it at any time: after
a look at every record of a large catalog that is the whole catalog. So a process that has read much lets go of the
pages; they stay in the kernel's page cache, and those that are needed again come back without a read.
"""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

_PATIENCE: Final = 32 * 2**20
"""How many bytes are read before the pages are given back."""

_MAPS: Final = Path("/proc/self/maps")


class Residency:
    """Counts what is read through the map of one file."""

    def __init__(self, path: Path) -> None:
        self._path = os.path.realpath(path)
        self._read = 0

    def note(self, size: int) -> None:
        """Count ``size`` bytes that have been copied out of the map, and give pages back when that is due.

        The file must stay mapped where it is meanwhile.
        """
        self._read += size
        if self._read >= _PATIENCE:
            self._read = 0
            _give_back(self._path)


def _give_back(path: str) -> None:
    """Take the pages of a file that is mapped for reading, and shared, out of the resident set."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        advise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return  # no Linux: then nothing is given back, and nothing is lost
    for line in lines:
        # Only what is shared and cannot be written to: of other maps this would drop what they hold.
        span, rights, *rest = line.split(maxsplit=5)
        if rights.startswith("r-") and rights.endswith("s") and rest[-1:] == [path]:
            begin, end = (int(address, 16) for address in span.split("-"))
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
