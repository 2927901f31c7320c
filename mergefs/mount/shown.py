"""What one directory of a mount holds: the files of a merged model, or the reason why there is none."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from blake3 import blake3

from mergefs.engine.model_files import ModelFiles
from mergefs.mount.reading_ahead import FileBlocks
from mergefs.mount.tree import Attributes

ERROR_FILE: Final = "ERROR.txt"

ReadRange = Callable[[int, int], bytes]
"""Returns the bytes of a file from an offset, so many of them; fewer only where the file ends."""


@dataclass(frozen=True, slots=True)
class Opened:
    """How to read a file of ``size`` bytes, and what of it can be computed ahead of its readers, if anything."""

    read: ReadRange
    size: int
    blocks: FileBlocks | None = None


class ShownDirectory(Protocol):
    """A directory with everything below it. Paths are relative to it, without a slash in front; ``""`` is itself."""

    def attributes(self, path: str) -> Attributes:
        """Return the attributes of ``path``; FileNotFoundError when there is none."""

    def entries(self, path: str) -> Sequence[str]:
        """Return the names in the directory ``path``; NotADirectoryError on a file."""

    def open(self, path: str) -> Opened:
        """Check that the file ``path`` can be read to its end, and return how."""

    @property
    def plan_id(self) -> str | None:
        """The plan that it shows; None where there is none."""

    @property
    def size(self) -> int:
        """The bytes of all files."""


class _Names:
    """The names of files and of the directories that they imply."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = frozenset(files)
        self._directories: dict[str, dict[str, None]] = {"": {}}
        for file in files:
            path = file
            while path:
                parent, _, name = path.rpartition("/")
                self._directories.setdefault(parent, {})[name] = None
                path = parent

    def is_directory(self, path: str) -> bool:
        """Return whether ``path`` is a directory; FileNotFoundError when it is nothing."""
        if path in self._directories:
            return True
        if path not in self._files:
            raise FileNotFoundError(errno.ENOENT, "no such entry", path)
        return False

    def entries(self, path: str) -> Sequence[str]:
        """Return the names in a directory."""
        if not self.is_directory(path):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
        return tuple(self._directories[path])

    def require_file(self, path: str) -> None:
        """Raise IsADirectoryError or FileNotFoundError unless ``path`` is a file."""
        if self.is_directory(path):
            raise IsADirectoryError(errno.EISDIR, "is a directory", path)


class ModelDirectory:
    """The directory of one merged model."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self._names = _Names(tuple(files.sizes))

    @property
    def plan_id(self) -> str | None:
        """The plan of the model."""
        return self.files.plan.plan_id

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(self.files.sizes.values())

    def attributes(self, path: str) -> Attributes:
        """Return the attributes of ``path``; inodes are the plan's own, times are when the plan was made."""
        plan = self.files.plan
        is_directory = self._names.is_directory(path)
        size = 0 if is_directory else self.files.sizes[path]
        return Attributes(inode_of(plan.plan_id, path), is_directory, size, plan.created_ns)

    def entries(self, path: str) -> Sequence[str]:
        """Return the names in the directory ``path``."""
        return self._names.entries(path)

    def open(self, path: str) -> Opened:
        """Check the sources of the file ``path`` and return how to read it."""
        self._names.require_file(path)
        self.files.check(path)
        return Opened(partial(self.files.read, path), self.files.sizes[path], self.files.blocks(path))


class ErrorDirectory:
    """What is shown of a recipe that cannot be planned: one file that says why. ``since_ns`` is when that was found."""

    plan_id: str | None = None

    def __init__(self, sentence: str, since_ns: int) -> None:
        self.sentence = sentence
        self._since_ns = since_ns
        self._content = f"{sentence}\n".encode(errors="surrogateescape")
        self._names = _Names((ERROR_FILE,))

    @property
    def size(self) -> int:
        """The bytes of the file."""
        return len(self._content)

    def attributes(self, path: str) -> Attributes:
        """Return the attributes of the directory or its file."""
        is_directory = self._names.is_directory(path)
        size = 0 if is_directory else len(self._content)
        return Attributes(inode_of(f"{self.sentence}\0{self._since_ns}", path), is_directory, size, self._since_ns)

    def entries(self, path: str) -> Sequence[str]:
        """Return the name of the file."""
        return self._names.entries(path)

    def open(self, path: str) -> Opened:
        """Return how to read the file."""
        self._names.require_file(path)
        return Opened(lambda offset, size: self._content[offset : offset + size], len(self._content))


def inode_of(owner: str, path: str) -> int:
    """Return an inode number that is the same for the same owner and path, and another for another owner."""
    number = int.from_bytes(blake3(f"{owner}\0{path}".encode(errors="surrogateescape")).digest(length=8), "little") >> 1
    return max(number, 2)
