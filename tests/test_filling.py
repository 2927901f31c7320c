"""What is about to be read is brought into the page cache in order, and only what is not there."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergefs.sources import filling
from mergefs.sources.filling import PageCacheFiller
from mergefs.sources.page_cache import cached_pages

MIB = 2**20
SIZE = 64 * MIB
RANGE = 3 * MIB + 4096 + 7


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """A file of which the cache has nothing."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB) * (SIZE // MIB))
    descriptor = os.open(path, os.O_RDWR)
    evict(descriptor)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The offset and the size of every read."""
    reads: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reads.append((offset, sum(map(len, buffers))))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return reads


def evict(descriptor: int) -> None:
    """Take a file out of the cache."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_pages(descriptor, 0, SIZE) == 0, "tests need a file system that gives up what it holds"


def test_a_file_is_read_as_a_whole_and_once_though_the_system_reads_ahead_of_it(
    descriptor: int, read: list[tuple[int, int]]
) -> None:
    filler = PageCacheFiller()
    for begin in range(0, SIZE, RANGE):
        filler.fill("file", descriptor, begin, min(begin + RANGE, SIZE))
    position = 0
    for offset, size in read:
        assert offset == position, "out of order"
        position += size
    assert position == SIZE
    assert cached_pages(descriptor, 0, SIZE) == SIZE // os.sysconf("SC_PAGESIZE")


def test_what_lies_in_the_cache_is_not_read(descriptor: int, read: list[tuple[int, int]]) -> None:
    os.pread(descriptor, SIZE, 0)
    filler = PageCacheFiller()
    for begin in range(0, SIZE, RANGE):
        filler.fill("file", descriptor, begin, min(begin + RANGE, SIZE))
    filler.fill("file", descriptor, 5, 5)
    assert read == []


def test_what_was_found_in_the_cache_is_believed_for_what_lies_soon_behind_it(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is not asked for each range, and again where it was not asked of anything near."""
    asked: list[int] = []

    def cached(descriptor: int, offset: int, size: int) -> int:
        asked.append(offset)
        return cached_pages(descriptor, offset, size)

    monkeypatch.setattr(filling, "cached_pages", cached)
    monkeypatch.setattr(filling, "_BEYOND", 16 * MIB)
    monkeypatch.setattr(filling, "_TRUSTED", 8 * MIB)
    os.pread(descriptor, SIZE, 0)
    filler = PageCacheFiller()
    for begin in range(0, SIZE, MIB):
        filler.fill("file", descriptor, begin, begin + MIB)
    # Of the ranges that the system is asked about; and of each it is asked what lies far behind it, too.
    begins = range(0, SIZE - MIB, 9 * MIB)
    assert asked == [offset for begin in begins for offset in (min(begin + 17 * MIB, SIZE - 1), begin)]
    evict(descriptor)
    asked.clear()
    filler.fill("other", descriptor, 0, MIB)
    assert cached_pages(descriptor, 0, MIB) and asked, "nothing is believed of a file for what was found of another"


def test_of_a_file_that_lies_there_in_part_the_rest_is_read(descriptor: int, read: list[tuple[int, int]]) -> None:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or more than is asked for comes into the cache
    os.pread(descriptor, SIZE // 2, SIZE // 2)
    filler = PageCacheFiller()
    for begin in range(0, SIZE, 4 * MIB):
        filler.fill("file", descriptor, begin, begin + 4 * MIB)
    assert cached_pages(descriptor, 0, SIZE) == SIZE // os.sysconf("SC_PAGESIZE")
    assert max(offset for offset, _ in read) < SIZE // 2


def test_files_are_told_apart(descriptor: int, read: list[tuple[int, int]]) -> None:
    filler = PageCacheFiller()
    filler.fill("one", descriptor, 0, MIB)
    os.pread(descriptor, SIZE, 0)
    read.clear()
    filler.fill("other", descriptor, 0, MIB)
    assert read == []


def test_nothing_is_read_twice_that_the_system_does_not_keep(
    descriptor: int, read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "cached_pages", lambda descriptor, offset, size: 0)
    filler = PageCacheFiller()
    for begin in (0, MIB, 2 * MIB):
        filler.fill("file", descriptor, begin, begin + MIB)
    assert read == [(0, MIB)]


def test_a_system_that_cannot_tell_is_asked_to_read_for_itself(
    descriptor: int, read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_tell(descriptor: int, offset: int, size: int) -> int:
        raise OSError(errno.ENOSYS, "not implemented")

    advice: list[tuple[int, int, int]] = []
    monkeypatch.setattr(filling, "cached_pages", cannot_tell)
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *rest: advice.append(rest))
    PageCacheFiller().fill("file", descriptor, MIB, 3 * MIB)
    assert (read, advice) == ([], [(MIB, 2 * MIB, os.POSIX_FADV_WILLNEED)])
