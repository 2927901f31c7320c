"""Takes files out of the page cache and brings them in, and slows down the disk for single programs."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from bench.processes import FREE, Limits

THROTTLED: Final = 500 * 10**6
"""Bytes for each second of a slow source: a good network file system, or a plain SSD."""

_STEP: Final = 2**20
_GROUPS: Final = Path("/sys/fs/cgroup/blkio")
_UNIFIED: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_NAME: Final = "mergefs-bench"


def evict(files: Sequence[Path]) -> None:
    """Take files out of the page cache; what has not been written to the disk must have been synced."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def bring_in(files: Sequence[Path]) -> None:
    """Have all of some files in the page cache as plain reading leaves them, from their beginnings to their ends.

    The system keeps files in pages of other sizes where programs have read them otherwise, and whoever reads them
    again is slower or faster for it.
    """
    evict(files)
    memory = bytearray(_STEP)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


@contextmanager
def throttled(directory: Path, rate: int = THROTTLED) -> Iterator[Limits | None]:
    """Lend limits under which programs read the disk of ``directory`` at ``rate`` bytes a second at most.

    None where the kernel offers no such limits, or only to root. Pages that are in the cache are not limited.
    """
    group = _make_group(directory, rate)
    try:
        yield None if group is None else Limits(groups=(group / "cgroup.procs",))
    finally:
        if group is not None:
            with suppress(OSError):
                group.rmdir()


def _make_group(directory: Path, rate: int) -> Path | None:
    """Return a group of the kernel's with the limit, of either version of its interface."""
    device = _disk_of(directory)
    found: Path | None = None
    for parent, name, limit in (
        (_GROUPS, "blkio.throttle.read_bps_device", f"{device} {rate}"),
        *((unified, "io.max", f"{device} rbps={rate}") for unified in _UNIFIED),
    ):
        group = parent / _NAME
        with suppress(OSError):
            group.mkdir(exist_ok=True)
            if (group / name).exists():
                (group / name).write_text(limit)
                found = group
                break
            group.rmdir()
    return found


def _disk_of(directory: Path) -> str:
    """Return major and minor number of the disk that a directory is on: of all of it, where that is a partition."""
    number = directory.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if (device / "partition").exists():
        device = device.resolve().parent
    return (device / "dev").read_text().strip() if (device / "dev").exists() else device.name


def limits_or_free(limits: Limits | None) -> Limits:
    """Return ``limits``, or none."""
    return FREE if limits is None else limits
