"""The directory that a model is written into before it appears: beside its destination, under a lock.

At every instant the destination is absent, what it was before, or the complete new model: everything is written and
synced in the staging directory, where one rename (or an exchange with what is replaced) then takes the model from. The
lock is a file of its own beside both, and held until the last of it is done.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mergefs.errors import MaterializeError
from mergefs.materialize.system import exchange, sync_directory


@dataclass(frozen=True, slots=True)
class Staging:
    """Where the model for ``destination`` is staged, by who holds the lock.

    ``path`` has the model and the journal of the work in it. It need not exist.
    """

    path: Path
    destination: Path

    @property
    def model(self) -> Path:
        """The directory that becomes the destination."""
        return self.path / "model"

    @property
    def journal(self) -> Path:
        """The journal of the work."""
        return self.path / "journal"

    def create(self) -> None:
        """Make the directories, durably. Raises MaterializeError."""
        try:
            self.model.mkdir(parents=True)
            sync_directory(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise cannot_create(self.path, error) from error

    def commit(self) -> None:
        """Make the staged model the destination, durably; what it replaces is then in its place here."""
        try:
            for directory in sorted((d for d in self.model.rglob("*") if d.is_dir()), reverse=True):
                sync_directory(directory)
            sync_directory(self.model)
            sync_directory(self.path)
            if self.destination.is_dir() and any(self.destination.iterdir()):
                exchange(self.model, self.destination)
            else:
                self.model.rename(self.destination)
            sync_directory(self.destination.parent)
            sync_directory(self.path)
        except OSError as error:
            raise MaterializeError(
                f"{self.destination}: the finished model could not be put there for good ({error.strerror}); "
                "make the directory above it writable, or repair the disk, and run again with --resume"
            ) from error

    def remove(self) -> None:
        """Remove all that is staged, the journal last: while there is one, what is left tells what it is."""
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in self.path.iterdir():
                if entry != self.journal:
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            self.journal.unlink(missing_ok=True)
            self.path.rmdir()

    def allocated_bytes(self) -> int:
        """Return what the staged model takes on the disk already."""
        files = (path.lstat() for path in self.model.rglob("*") if path.is_file())
        return sum(status.st_blocks * 512 for status in files)


def staging_path(destination: Path) -> Path:
    """Return where a model for ``destination`` is staged: one place, so that two runs meet and leftovers are found."""
    return destination.parent / f".{destination.name}.mergefs-staging"


def lock_path(destination: Path) -> Path:
    """Return the file that whoever writes to ``destination`` has locked; it holds the process's id."""
    return destination.parent / f".{destination.name}.mergefs-lock"


@contextmanager
def locked(destination: Path) -> Iterator[Staging]:
    """Lend the staging place of ``destination`` to this process alone.

    Directories above it are made, and removed again if they stay empty. Raises MaterializeError while another process
    is at work.
    """
    path = lock_path(destination)
    made = _missing_parents(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        for parent in made:
            sync_directory(parent.parent)
        lock = _lock(path, destination)
    except OSError as error:
        raise cannot_create(staging_path(destination), error) from error
    try:
        yield Staging(staging_path(destination), destination)
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # unless something is in it now


def _missing_parents(destination: Path) -> list[Path]:
    """Return the directories above ``destination`` that are not there yet, the innermost first."""
    return [parent for parent in destination.parents if not parent.exists()]


def cannot_create(path: Path, error: OSError) -> MaterializeError:
    """Return the error for something that cannot be made beside the destination."""
    return MaterializeError(
        f"{path}: cannot be created ({error.strerror}); make its parent writable, or choose another place"
    )


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
            name = _name_of_holder(descriptor)
            os.close(descriptor)
            raise MaterializeError(
                f"{destination}: process {name} is writing this model already; wait for it, or stop it"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who had it has just removed it


def _name_of_holder(descriptor: int) -> str:
    """Return what whoever holds the lock has written down."""
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "another process"
