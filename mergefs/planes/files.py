"""Writes the files of planes: under a temporary name until all bytes are on the disk."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import uuid4

from blake3 import blake3

from mergefs.catalog.directory import PLANES
from mergefs.errors import CatalogError

_UNFINISHED: Final = ".unfinished"
_SUFFIX: Final = ".planes"


def planes_directory(catalog: Path) -> Path:
    """Return where the files of planes lie, beside the tables of the catalog in the directory ``catalog``."""
    return catalog / PLANES


class PlaneFile:
    """A file that grows until it is committed or given up; its name is the hash of its bytes.

    Only what has been sealed is there after a commit.
    Whoever writes holds a lock on the file, so what a run that was killed has left can be told apart.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / f"{uuid4().hex}{_UNFINISHED}"
        self._hasher = blake3()
        self._sealed = (0, blake3())
        self.size = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        self._hasher.update(data)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        self.size += len(data)

    def seal(self) -> None:
        """Say that everything up to here is whole."""
        self._sealed = (self.size, self._hasher.copy())

    def commit(self) -> tuple[str, os.stat_result]:
        """Put what is sealed into its place, durably, and return its name and its status.

        Where a file of the same bytes is there already, that one stays.
        """
        size, hasher = self._sealed
        name = f"{hasher.digest(length=16).hex()}{_SUFFIX}"
        path = self._directory / name
        try:
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
            with suppress(FileExistsError):
                os.link(self._path, path)
            self._path.unlink()
            _sync_directory(self._directory)
            status = path.stat()
        except OSError as error:
            raise _cannot_write(path, error) from error
        finally:
            os.close(self._descriptor)
        return name, status

    def give_up(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def remove_leftovers(directory: Path) -> None:
    """Remove what runs that were killed have left in the directory."""
    for path in directory.glob(f"*{_UNFINISHED}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> CatalogError:
    """Return the error for planes that cannot be kept."""
    return CatalogError(
        f"{path}: delta planes cannot be written ({error.strerror}); free some space or make the directory writable, "
        "or name another directory with --catalog"
    )
