"""What of a file lies in memory is known without reading it."""

import errno
import mmap
import os
from pathlib import Path

import pytest

from mergefs.sources import page_cache
from mergefs.sources.page_cache import cached_pages

PAGES = 64


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGES * mmap.PAGESIZE))
    return os.open(path, os.O_RDWR)


def test_pages_that_were_written_or_read_are_counted_and_those_that_were_given_up_are_not(descriptor: int) -> None:
    assert cached_pages(descriptor, 0, PAGES * mmap.PAGESIZE) == PAGES
    assert cached_pages(descriptor, mmap.PAGESIZE, 1) == 1
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_pages(descriptor, 0, PAGES * mmap.PAGESIZE) in (0, PAGES)  # a file system in memory gives nothing up
    os.pread(descriptor, 1, 0)
    assert cached_pages(descriptor, 0, 1) == 1
    os.close(descriptor)


def test_a_system_that_cannot_tell_is_an_error(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_CACHESTAT", 10**6)
    with pytest.raises(OSError, match="not implemented") as caught:
        cached_pages(descriptor, 0, 1)
    assert caught.value.errno == errno.ENOSYS
    os.close(descriptor)
    with pytest.raises(OSError):
        cached_pages(descriptor, 0, 1)
