"""The tree that a mount shows, without a word about FUSE.

The adapter puts a ``Tree`` onto a binding of libfuse; tests drive the adapter with a tree of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

STATUS_ATTRIBUTE: Final = "user.mergefs.status"
"""The extended attribute of the root that holds what the mount says of itself, as JSON."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What ``stat`` says of an entry. Sizes in bytes, times in nanoseconds since 1970."""

    inode: int
    is_directory: bool
    size: int
    mtime_ns: int
    link_target: str | None = None  # set for a symbolic link


class Tree(Protocol):
    """A read-only directory tree. Paths are absolute within it, ``/`` is its root.

    Every method may be called from many threads at once. What fails raises ``OSError`` with an errno, or a
    ``MergefsError``, which carries one.
    """

    def attributes(self, path: str) -> Attributes:
        """Return the attributes of ``path``; FileNotFoundError when there is none."""

    def entries(self, path: str) -> Sequence[str]:
        """Return the names in the directory ``path``, without ``.`` and ``..``; NotADirectoryError on a file."""

    def open(self, path: str) -> int:
        """Check that the file ``path`` can be read to its end, and return a handle for it."""

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``: fewer only where the file ends."""

    def release(self, handle: int) -> None:
        """Give ``handle`` back."""

    def extended_attributes(self, path: str) -> Sequence[str]:
        """Return the names of the extended attributes of ``path`` that are worth listing."""

    def extended_attribute(self, path: str, name: str) -> bytes:
        """Return one extended attribute; OSError(ENODATA) when there is none of that name."""

    def total_size(self) -> int:
        """Return the bytes of all files, for ``df``."""

    def close(self) -> None:
        """Release everything; no other call follows."""
