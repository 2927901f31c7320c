"""The directory that a catalog lies in: whether it can hold one, who uses it, and the sizes of its files.

Every process that has the catalog open holds a shared lock (``flock``) on ``users.lock``. Who creates or replaces files
holds it alone, so a file that is missing while others hold the lock was removed under them, and is not made anew.
"""

import ctypes
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mergefs.errors import CatalogError

DATA: Final = "data.mdb"
READERS: Final = "lock.mdb"
USERS: Final = "users.lock"
PLANES: Final = "planes"
"""The directory of the files of delta planes."""
COMPACTING: Final = "compacting"
"""The directory that a smaller copy of the data is written in."""
SALVAGE: Final = "salvage"
"""The directory that what can be read of damaged data is written in."""
DAMAGED_DATA: Final = "data.mdb.damaged"
"""What damaged data is called once other data has taken its place."""

_WAITING_DEADLINE: Final = 60.0
"""Seconds to wait for a process that creates, compacts or repairs the catalog."""

# What statfs(2) calls file systems that several machines share.
_NETWORK_TYPES: Final = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x73757245: "coda",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x20030528: "orangefs",
    0x7461636F: "ocfs2",
    0x01161970: "gfs2",
}
_FUSE_TYPE: Final = 0x65735546
_NETWORK_FUSE: Final = ("sshfs", "rclone", "s3fs", "gcsfuse", "glusterfs", "ceph-fuse", "davfs", "cephfs", "mount-s3")


class _StatFs(ctypes.Structure):
    """The beginning of Linux' ``struct statfs``, which is 120 bytes long on 64 bit systems."""

    _fields_ = (("f_type", ctypes.c_ulong), ("rest", ctypes.c_ubyte * 248))


def filesystem_type(path: Path) -> int:
    """Return the number that statfs(2) gives the file system of ``path``; 0 where it cannot be asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = _StatFs()
    if libc.statfs(os.fsencode(path), ctypes.byref(found)) != 0:
        return 0
    return int(found.f_type) & 0xFFFFFFFF


def mounted_type(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """Return what the kernel's list of mounts calls the file system of ``path``, such as ``fuse.sshfs``; or nothing."""
    best, kind = -1, ""
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    resolved = path.resolve()
    for line in lines:
        fields = line.split(" ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[fields.index("-", 6) + 1]
    return kind


def refuse_network(path: Path) -> None:
    """Raise CatalogError where ``path`` lies on a file system that several machines share."""
    number = filesystem_type(path)
    name = _NETWORK_TYPES.get(number)
    if number == _FUSE_TYPE:
        mounted = mounted_type(path)
        name = mounted if any(known in mounted for known in _NETWORK_FUSE) else None
    if name is not None:
        raise CatalogError(
            f"{path}: lies on a network file system ({name}), where processes cannot share the catalog safely; name a "
            "directory on a local disk with --catalog or MERGEFS_CATALOG"
        )


class Users:
    """The lock that says who uses a catalog: shared by its users, held alone by who creates or replaces files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor = os.open(directory / USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def enter(self) -> bool:
        """Take the lock, alone where nobody else has it, and return whether it is held alone.

        Raises CatalogError when another process holds it alone for too long.
        """
        deadline = time.monotonic() + _WAITING_DEADLINE
        while not (alone := self.try_alone()) and not self._try(fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise CatalogError(
                    f"{self._directory}: {self.names()} has the catalog for itself for more than a minute, to compact "
                    "or repair it; wait for it, or stop it"
                )
            time.sleep(0.01)  # the system has no wait for a lock with a deadline
        return alone

    def try_alone(self) -> bool:
        """Hold the lock alone, if nobody else has it; else it is not held at all."""
        return self._try(fcntl.LOCK_EX)

    def share(self) -> None:
        """Hold the lock with others. Raises CatalogError where one of them has taken it alone in between."""
        if not self._try(fcntl.LOCK_SH):
            raise CatalogError(
                f"{self._directory}: {self.names()} has just taken the catalog for itself, to compact or repair it; "
                "run the command again"
            )

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)

    def others(self) -> tuple[int, ...]:
        """Return the processes that have the lock beside this one, as far as the system tells."""
        mark = os.fstat(self._descriptor)
        node = f"{os.major(mark.st_dev):02x}:{os.minor(mark.st_dev):02x}:{mark.st_ino}"
        try:
            lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        except OSError:
            return ()
        found = {int(line[4]) for line in lines if len(line) > 5 and line[1] == "FLOCK" and line[5] == node}
        return tuple(sorted(found - {os.getpid()}))

    def names(self) -> str:
        """Return the other users as words."""
        others = self.others()
        if not others:
            return "another process"
        return ("process " if len(others) == 1 else "processes ") + ", ".join(map(str, others))

    def _try(self, operation: int) -> bool:
        try:
            fcntl.flock(self._descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def alone(directory: Path) -> Iterator[bool]:
    """Keep every other process out of the catalog, if none has it open; lends whether that is so."""
    users = Users(directory)
    try:
        yield users.try_alone()
    finally:
        users.close()


def allocate(path: Path, size: int) -> None:
    """Make a file ``size`` bytes long, with disk blocks for all of them; one that is longer stays as it is."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(descriptor).st_size < size:
            os.posix_fallocate(descriptor, 0, size)
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def stretch(path: Path, size: int) -> None:
    """Make a file at least ``size`` bytes long, without disk blocks for what nobody has written.

    The lock keeps two processes from undoing each other's.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
