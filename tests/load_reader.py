"""A process of a load: threads that read random pages of many files by mmap and ``pread`` and compare every byte.

``load_reader.py SEED STOP SLOT THREADS PROGRESS MOUNT EXPECTED NAME...`` reads until the monotonic clock shows STOP.
The weights of each NAME lie in MOUNT/NAME and, as they must be, in EXPECTED/NAME. Each thread keeps its counts in its
place of the file PROGRESS, from SLOT on, where whoever watches sees whether it gets on. A wrong byte or an error is one
line on stdout and ends the process with status 1; a mapping that cannot be read kills it by SIGBUS.

It imports nothing that would make the start of one slow. Pages are compared by the C library, which holds no lock of
Python meanwhile: so all threads wait for pages at the same time.
"""

import ctypes
import mmap
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

WEIGHTS: Final = "model.safetensors"
PAGE: Final = mmap.PAGESIZE
COUNTS: Final = struct.Struct("=QQQQ")
"""What is known of a thread: pages that were right, reads, its slowest read (ns), and when it last ended one (ns)."""

_ROUND: Final = 12
"""Ranges that are read of a file before it is closed again."""
_LONGEST: Final = 24
"""Pages of the longest range: many ranges then lie in more than one request, and some in more than one block."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A file in memory. Its pages are not written to, so they stay those of the file."""

    address: int
    size: int


@contextmanager
def mapped(descriptor: int, advice: int | None = None) -> Iterator[Mapping]:
    """Map a file, for no longer than this context."""
    # A private mapping, because ctypes tells the address of nothing that cannot be written to.
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapping:
        if advice is not None:
            mapping.madvise(advice)
        pointer = ctypes.c_char.from_buffer(mapping)
        try:
            yield Mapping(ctypes.addressof(pointer), len(mapping))
        finally:
            del pointer


class Reader:
    """One thread of a load."""

    def __init__(self, seed: str, stop: float, counts: memoryview, files: dict[Path, Mapping]) -> None:
        self.chance = random.Random(seed)
        self.stop = stop
        self.counts = counts
        self.files = files
        self.pages = self.reads = self.slowest = 0
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self.buffer = mmap.mmap(-1, (_LONGEST + 1) * PAGE)  # whole pages, as O_DIRECT wants them

    def run(self) -> None:
        """Read until it is time to stop, and at least once."""
        paths = sorted(self.files)
        while not self.reads or time.monotonic() < self.stop:
            path = self.chance.choice(paths)
            self.chance.choice((self.by_mapping, self.by_mapping, self.by_pread, self.directly))(path)

    def by_mapping(self, path: Path) -> None:
        """Fault pages of a mapping."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with mapped(descriptor, self.chance.choice((None, mmap.MADV_RANDOM))) as found:
                for offset, size in self.ranges(path):
                    with self.timed(size):
                        self.compare(path, found.address + offset, offset, size)
            # What is in no mapping leaves the memory of the kernel, so that the server is asked again.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def by_pread(self, path: Path) -> None:
        """Read ranges into memory of this process."""
        self.read(path, os.O_RDONLY)

    def directly(self, path: Path) -> None:
        """Read past the memory of the kernel: every read reaches the server."""
        self.read(path, os.O_RDONLY | os.O_DIRECT)

    def read(self, path: Path, flags: int) -> None:
        """Read ranges with ``preadv`` from a file that is opened with these ``flags``."""
        descriptor = os.open(path, flags)
        try:
            for offset, size in self.ranges(path):
                with self.timed(size):
                    done = 0
                    while done < size:
                        rest = -(-(size - done) // PAGE) * PAGE  # O_DIRECT reads whole pages
                        count = os.preadv(descriptor, [memoryview(self.buffer)[done : done + rest]], offset + done)
                        if count == 0:
                            raise AssertionError(f"{path} ends at {offset + done}, before {offset + size}")
                        done += count
                pointer = ctypes.c_char.from_buffer(self.buffer)
                self.compare(path, ctypes.addressof(pointer), offset, size)
                del pointer
        finally:
            os.close(descriptor)

    def ranges(self, path: Path) -> Iterator[tuple[int, int]]:
        """Yield ranges of whole pages at random, the last of which may be cut by the end of the file."""
        size = self.files[path].size
        for number in range(_ROUND):
            if number and time.monotonic() >= self.stop:
                return
            first = self.chance.randrange(-(-size // PAGE))
            count = self.chance.choice((1, 1, 1, 2, _LONGEST))
            yield first * PAGE, min(count * PAGE, size - first * PAGE)

    def compare(self, path: Path, address: int, offset: int, size: int) -> None:
        """Hold memory against what the file must hold from ``offset`` on."""
        if self.libc.memcmp(address, self.files[path].address + offset, size):
            raise AssertionError(f"{path}: the bytes {offset} to {offset + size} are wrong")

    @contextmanager
    def timed(self, size: int) -> Iterator[None]:
        """Count what is read meanwhile."""
        begun = time.monotonic_ns()
        yield
        ended = time.monotonic_ns()
        self.pages += -(-size // PAGE)
        self.reads += 1
        self.slowest = max(self.slowest, ended - begun)
        COUNTS.pack_into(self.counts, 0, self.pages, self.reads, self.slowest, ended)


def main(arguments: list[str]) -> int:
    """Read with all threads, and return the exit status."""
    seed, stop, slot, threads, progress, mount, expected, *names = arguments
    files: dict[Path, Mapping] = {}
    failures: list[str] = []
    with Path(progress).open("r+b") as shared:
        places = memoryview(mmap.mmap(shared.fileno(), 0))

    def work(number: int) -> None:
        place = (int(slot) + number) * COUNTS.size
        try:
            Reader(f"{seed} {number}", float(stop), places[place : place + COUNTS.size], files).run()
        except BaseException as error:
            failures.append(f"{type(error).__name__}: {error}")

    with ExitStack() as stack:
        for name in names:
            file = stack.enter_context((Path(expected) / name / WEIGHTS).open("rb"))
            files[Path(mount) / name / WEIGHTS] = stack.enter_context(mapped(file.fileno()))
        workers = [threading.Thread(target=work, args=(number,)) for number in range(int(threads))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for failure in failures:
        print(failure, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
