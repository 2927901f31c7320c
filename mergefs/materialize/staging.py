"""The directory that a model is written into before it appears: beside its destination, under a lock.

At every instant the destination is absent, what it was before, or the complete new model: everything is written and
synced in the staging directory, which one rename (or an exchange with what is replaced) then makes the destination. The
lock is a file of its own beside both, and held until the last of it is done.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergefs.errors import MaterializeError

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@dataclass(frozen=True, slots=True)
class Staging:
    """A staging directory that this process holds the lock of."""

    path: Path
    destination: Path

    def commit(self) -> None:
        """Make the staging directory the destination, durably; what it replaces is then in the staging directory."""
        for directory in sorted((d for d in self.path.rglob("*") if d.is_dir()), reverse=True):
            sync_directory(directory)
        sync_directory(self.path)
        replaces = self.destination.is_dir() and any(self.destination.iterdir())
        try:
            if replaces:
                _exchange(self.path, self.destination)
            else:
                self.path.rename(self.destination)
        except OSError as error:
            raise MaterializeError(
                f"{self.destination}: the finished model could not be put there ({error.strerror}); "
                "make the directory above it writable and run again"
            ) from error
        sync_directory(self.destination.parent)


def staging_path(destination: Path) -> Path:
    """Return where a model for ``destination`` is staged: one place, so that two runs meet and leftovers are found."""
    return destination.parent / f".{destination.name}.mergefs-staging"


@contextmanager
def staging(destination: Path) -> Iterator[Staging]:
    """Lend the staging directory for ``destination``; it is gone afterwards, unless it was committed.

    What an interrupted run left there is removed first. Raises MaterializeError while another process is at work.
    """
    path = staging_path(destination)
    lock_path = destination.parent / f".{destination.name}.mergefs-lock"
    made = _missing_parents(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(lock_path, destination)
    except OSError as error:
        raise _cannot_create(path, error) from error
    try:
        try:
            if path.exists():
                shutil.rmtree(path)
            path.mkdir()
        except OSError as error:
            raise _cannot_create(path, error) from error
        yield Staging(path, destination)
    finally:
        # What an error has left is of no use to anybody, and after a commit this is what was replaced.
        shutil.rmtree(path, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        os.close(lock)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # unless the model is in it now


def _missing_parents(destination: Path) -> list[Path]:
    """Return the directories above ``destination`` that are not there yet, the innermost first."""
    return [parent for parent in destination.parents if not parent.exists()]


def _cannot_create(path: Path, error: OSError) -> MaterializeError:
    """Return the error for a staging directory that cannot be made."""
    return MaterializeError(
        f"{path}: cannot be created ({error.strerror}); make its parent writable, or choose another place"
    )


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path, destination: Path) -> int:
    """Take the lock, write down who has it, and return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise MaterializeError(
                f"{destination}: process {holder} is writing this model already; wait for it, or stop it"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who had it has just removed it


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories in one step (renameat2 with RENAME_EXCHANGE). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "this system cannot exchange directories in one step")
    if libc.renameat2(_AT_FDCWD, bytes(first), _AT_FDCWD, bytes(second), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
