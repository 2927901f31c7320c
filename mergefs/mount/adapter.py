"""A ``Tree`` as the operations that libfuse calls. Works with fusepy and with mfusepy, and imports neither."""

import errno
import itertools
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Final, NoReturn

from mergefs.mount.guard import WrongAnswerError, guarded, log_failure
from mergefs.mount.tree import STATUS_ATTRIBUTE, Attributes, Tree

_PREFERRED_BLOCK: Final = 1 << 20
_STATFS_BLOCK: Final = 4096

# Not O_APPEND, with which a file may be opened for reading, too, nor O_CREAT, which the kernel keeps to itself.
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """A file that some client holds open. ``handle`` is the tree's."""

    path: str
    handle: int
    size: int


def _from_wire(text: str) -> str:
    """Return the path that the binding decoded as latin-1, decoded as Python decodes file names."""
    return os.fsdecode(text.encode("latin-1"))


def _to_wire(name: str) -> str:
    """Return a name of the tree so that the binding, which encodes it as latin-1, sends the bytes of the file name."""
    return os.fsencode(name).decode("latin-1")


def _refuse() -> NoReturn:
    """Refuse to change anything."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _parent(path: str) -> str:
    """Return the directory that ``path`` is in; the root is in itself."""
    return path.rpartition("/")[0] or "/"


def _child(directory: str, name: str) -> str:
    """Return the path of the entry ``name`` of ``directory``."""
    return f"/{name}" if directory == "/" else f"{directory}/{name}"


class TreeOperations:
    """The operations of a read-only file system that shows ``tree``.

    Every method may be called from many threads at once. Whatever goes wrong inside one is logged and becomes an
    errno; see ``mergefs.mount.guard``. ``on_init`` is called once, when the kernel has begun to talk to the mount.
    """

    use_ns = True  # times in nanoseconds

    def __init__(self, tree: Tree, mountpoint: Path, on_init: Callable[[], None] = lambda: None) -> None:
        self._tree = tree
        self._mountpoint = mountpoint
        self._on_init = on_init
        self._owner = (os.getuid(), os.getgid())
        self._started = time.monotonic()
        self._initialised = False
        # Single operations on a dict and on a count are atomic, so no lock is needed.
        self._open_files: dict[int, _OpenFile] = {}
        self._handles = itertools.count(1)

    @property
    def initialised(self) -> bool:
        """Whether the kernel has begun to talk to the file system."""
        return self._initialised

    # -- the life of the mount --------------------------------------------------------------------------------------

    @guarded
    def init(self, path: str) -> None:
        """Note that the mount has begun."""
        self._initialised = True
        self._on_init()

    @guarded
    def destroy(self, path: str) -> None:
        """Do nothing: the tree is closed by whoever built it."""

    # -- names and attributes ---------------------------------------------------------------------------------------

    @guarded
    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        """Return the fields of ``stat``, times in nanoseconds."""
        decoded = _from_wire(path)
        return self._stat(decoded, self._tree.attributes(decoded))

    def _stat(self, path: str, attributes: Attributes) -> dict[str, int]:
        """Return ``attributes`` as the fields of ``stat``."""
        size, mtime = index(attributes.size), index(attributes.mtime_ns)
        if size < 0 or index(attributes.inode) <= 0:
            raise WrongAnswerError(f"impossible attributes {attributes}")
        links = 1
        if attributes.is_directory:
            mode = stat.S_IFDIR | 0o555
            links = 2 + self._count_directories(path)
        elif attributes.link_target is not None:
            mode = stat.S_IFLNK | 0o777
            size = len(os.fsencode(attributes.link_target))
        else:
            mode = stat.S_IFREG | 0o444
        return {
            "st_ino": attributes.inode,
            "st_mode": mode,
            "st_nlink": links,
            "st_uid": self._owner[0],
            "st_gid": self._owner[1],
            "st_size": size,
            "st_blksize": _PREFERRED_BLOCK,
            "st_blocks": -(-size // 512),
            "st_atime": mtime,
            "st_mtime": mtime,
            "st_ctime": mtime,
        }

    def _count_directories(self, path: str) -> int:
        """Return how many directories ``path`` holds, as far as can be told: a broken one can still be looked at."""
        try:
            names = [*self._tree.entries(path)]
        except BaseException as error:
            log_failure("entries", path, error)
            return 0
        children = (self._child_attributes(_child(path, name)) for name in names)
        return sum(1 for child in children if child is not None and child.is_directory)

    def _child_attributes(self, path: str) -> Attributes | None:
        """Return the attributes of an entry, or None where that fails: its directory can be listed all the same."""
        try:
            return self._tree.attributes(path)
        except BaseException as error:
            log_failure("attributes", path, error)
            return None

    @guarded
    def access(self, path: str, amode: int) -> int:
        """Check that ``path`` exists and that nobody wants to write to it."""
        if amode & os.W_OK:
            _refuse()
        self._tree.attributes(_from_wire(path))
        return 0

    @guarded
    def readlink(self, path: str) -> str:
        """Return the target of a symbolic link."""
        target = self._tree.attributes(_from_wire(path)).link_target
        if target is None:
            # The kernel asks only about what it knows as a link. With this errno it looks the name up again.
            raise OSError(errno.ESTALE, "not a symbolic link any more")
        return _to_wire(target)

    @guarded
    def opendir(self, path: str) -> int:
        """Return a handle, which nothing depends on."""
        return 0

    @guarded
    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int] | None, int]]:
        """Return all entries of a directory with inode and type.

        A list, because an exception inside a generator would be raised where it cannot be caught.
        """
        directory = _from_wire(path)
        listing: list[tuple[str, dict[str, int] | None, int]] = [
            (".", self._entry_fields(self._tree.attributes(directory)), 0),
            ("..", self._entry_fields(self._tree.attributes(_parent(directory))), 0),
        ]
        for name in self._tree.entries(directory):
            attributes = self._child_attributes(_child(directory, name))
            # An entry that cannot be asked about is listed, and whoever asks gets the error.
            listing.append((_to_wire(name), None if attributes is None else self._entry_fields(attributes), 0))
        return listing

    def _entry_fields(self, attributes: Attributes) -> dict[str, int]:
        """Return the inode and the type, which is all that a directory entry carries."""
        if attributes.is_directory:
            mode = stat.S_IFDIR
        else:
            mode = stat.S_IFREG if attributes.link_target is None else stat.S_IFLNK
        return {"st_ino": index(attributes.inode), "st_mode": mode}

    @guarded
    def releasedir(self, path: str, fh: int) -> int:
        """Do nothing: a directory handle holds nothing."""
        return 0

    @guarded
    def statfs(self, path: str) -> dict[str, int]:
        """Return the size of the tree, with nothing free."""
        total = index(self._tree.total_size())
        return {
            "f_bsize": _STATFS_BLOCK,
            "f_frsize": _STATFS_BLOCK,
            "f_blocks": -(-total // _STATFS_BLOCK),
            "f_bfree": 0,
            "f_bavail": 0,
            "f_files": 0,
            "f_ffree": 0,
            "f_favail": 0,
            "f_namemax": 255,
        }

    # -- contents ---------------------------------------------------------------------------------------------------

    @guarded
    def open(self, path: str, flags: int) -> int:
        """Open a file for reading. The tree checks here that it can be read to its end."""
        if flags & _WRITE_FLAGS:
            _refuse()
        decoded = _from_wire(path)
        size = index(self._tree.attributes(decoded).size)
        opened = _OpenFile(decoded, self._tree.open(decoded), size)
        handle = next(self._handles)
        self._open_files[handle] = opened
        return handle

    @guarded
    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Return exactly the bytes of the range that lie before the end of the file.

        A tree that gives fewer is an error: the kernel would show zeros, or kill a client that has mapped the file.
        """
        opened = self._open_files[fh]
        wanted = min(size, opened.size - offset)
        if wanted <= 0:
            return b""
        data = self._tree.read(opened.handle, offset, wanted)
        if type(data) is not bytes:
            raise WrongAnswerError(f"read gave {type(data).__name__} in place of bytes")
        if len(data) != wanted:
            raise WrongAnswerError(f"read gave {len(data)} of {wanted} bytes at offset {offset}")
        return data

    @guarded
    def flush(self, path: str, fh: int) -> int:
        """Do nothing: there is nothing unwritten."""
        return 0

    @guarded
    def fsync(self, path: str, datasync: int, fh: int) -> int:
        """Do nothing: there is nothing unwritten."""
        return 0

    @guarded
    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        """Do nothing: there is nothing unwritten."""
        return 0

    @guarded
    def release(self, path: str, fh: int) -> int:
        """Close a file."""
        self._tree.release(self._open_files.pop(fh).handle)
        return 0

    @guarded
    def ioctl(self, path: str, cmd: int, arg: Any, fh: int, flags: int, data: Any) -> NoReturn:
        """Refuse: no file here is a device."""
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    # -- extended attributes ----------------------------------------------------------------------------------------

    @guarded
    def listxattr(self, path: str) -> list[str]:
        """Return the names of the extended attributes of ``path``."""
        return [_to_wire(name) for name in self._tree.extended_attributes(_from_wire(path))]

    @guarded
    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        """Return an extended attribute."""
        if path == "/" and name == STATUS_ATTRIBUTE:
            return self._status()
        value = self._tree.extended_attribute(_from_wire(path), _from_wire(name))
        if type(value) is not bytes:
            raise WrongAnswerError(f"the attribute {name} is {type(value).__name__} in place of bytes")
        return value

    def _status(self) -> bytes:
        """Return the JSON object that ``mergefs status`` shows: what the tree says, and what only the mount knows."""
        status: dict[str, Any] = {
            "mountpoint": str(self._mountpoint),
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 3),
        }
        try:
            status |= json.loads(self._tree.extended_attribute("/", STATUS_ATTRIBUTE))
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        return json.dumps(status).encode()

    # -- everything that would change something ---------------------------------------------------------------------
    # The mount is read-only, so the kernel refuses most of these itself. They are defined because a binding answers
    # ENOSYS, or even success, for some that are not.

    @guarded
    def create(self, path: str, mode: int, fi: Any = None) -> int:
        """Refuse to create a file."""
        _refuse()

    @guarded
    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Refuse to write."""
        _refuse()

    @guarded
    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Refuse to change a file's size."""
        _refuse()

    @guarded
    def mknod(self, path: str, mode: int, dev: int) -> int:
        """Refuse to create a node."""
        _refuse()

    @guarded
    def mkdir(self, path: str, mode: int) -> int:
        """Refuse to create a directory."""
        _refuse()

    @guarded
    def unlink(self, path: str) -> int:
        """Refuse to remove a file."""
        _refuse()

    @guarded
    def rmdir(self, path: str) -> int:
        """Refuse to remove a directory."""
        _refuse()

    @guarded
    def symlink(self, target: str, source: str) -> int:
        """Refuse to create a symbolic link."""
        _refuse()

    @guarded
    def rename(self, old: str, new: str) -> int:
        """Refuse to rename."""
        _refuse()

    @guarded
    def link(self, target: str, source: str) -> int:
        """Refuse to create a hard link."""
        _refuse()

    @guarded
    def chmod(self, path: str, mode: int) -> int:
        """Refuse to change permissions."""
        _refuse()

    @guarded
    def chown(self, path: str, uid: int, gid: int) -> int:
        """Refuse to change the owner."""
        _refuse()

    @guarded
    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        """Refuse to change times."""
        _refuse()

    @guarded
    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        """Refuse to set an extended attribute."""
        _refuse()

    @guarded
    def removexattr(self, path: str, name: str) -> int:
        """Refuse to remove an extended attribute."""
        _refuse()
