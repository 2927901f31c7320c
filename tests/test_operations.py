"""Every operation that a file system can be asked for, by the system calls that lead to it, and what comes of it.

What is asked of a mount is asked of a read-only mount of a disk too, where the tests may make one: both must answer
alike.
"""

# These tests are about system calls, by their names.
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH116, PTH208, PTH211

import ctypes
import errno
import fcntl
import inspect
import logging
import mmap
import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from examples import Families, FamilyKind
from hypothesis import given, settings
from hypothesis import strategies as st
from mounting import Mount, clear_mounts_below, is_running, mounted_recipes
from recipes import MERGES, recipe_document, write_document

from mergefs.mount.adapter import TreeOperations
from mergefs.mount.bindings import LOADERS
from mergefs.mount.build import BuildOptions, build_tree
from mergefs.mount.guard import answerable

pytestmark = pytest.mark.mounts

FILE: Final = "config.json"
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_ROOT: Final = os.geteuid() == 0
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_FIBMAP, _FIGETBSZ, _TCGETS = 1, 2, 0x5401


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of a read-only file system, and a file below it."""

    directory: Path
    file: Path

    @property
    def new(self) -> Path:
        """A name that is not there."""
        return self.directory / "new"


def renameat2(old: Path, new: Path, flags: int) -> None:
    """Call renameat2, which Python has no function for."""
    if _LIBC.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def with_open(action: Callable[[int], object], flags: int = os.O_RDONLY) -> Callable[[Place], object]:
    """Return what does ``action`` with a descriptor of the file."""

    def act(place: Place) -> object:
        descriptor = os.open(place.file, flags)
        try:
            return action(descriptor)
        finally:
            os.close(descriptor)

    return act


def opened(flags: int, new: bool = False) -> Callable[[Place], object]:
    """Return what opens the file, or a new one, and closes it."""
    return lambda place: os.close(os.open(place.new if new else place.file, flags, 0o644))


def with_directory(action: Callable[[int], object]) -> Callable[[Place], object]:
    """Return what does ``action`` with a descriptor of the directory."""

    def act(place: Place) -> object:
        descriptor = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return action(descriptor)
        finally:
            os.close(descriptor)

    return act


def bind_socket(place: Place) -> None:
    """Make a socket file; by a descriptor, since its path must be short."""
    directory = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{directory}/new")
    finally:
        os.close(directory)


def polled(descriptor: int) -> None:
    """Ask whether a descriptor can be read; a file always can."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(0) == [(descriptor, select.POLLIN)]


def written_through_a_map(descriptor: int) -> None:
    mmap.mmap(descriptor, 10, prot=mmap.PROT_WRITE, flags=mmap.MAP_SHARED)


def copied_into(descriptor: int) -> None:
    with tempfile.TemporaryFile() as source:
        source.write(b"text")
        source.flush()
        os.copy_file_range(source.fileno(), descriptor, 4, 0, 0)


def spliced(descriptor: int, into: bool) -> None:
    """Move bytes between a file and a pipe without a copy in this process."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"text")
        os.splice(reading, descriptor, 4) if into else os.splice(descriptor, writing, 10)
    finally:
        os.close(reading)
        os.close(writing)


def aligned_read(descriptor: int) -> None:
    """Read past the page cache, as O_DIRECT wants it: whole blocks to the beginning of a page."""
    with mmap.mmap(-1, 1 << 16) as buffer:
        assert os.preadv(descriptor, [buffer], 0) > 0
        assert buffer[:1] == b"{"


Call = Callable[[Place], object]
OK: Final = 0

# Operation -> what is done -> the errno. ``OK`` is no error. Every operation that libfuse knows is here.
OPERATIONS: Final[dict[str, dict[str, tuple[Call, int]]]] = {
    "init": {"any call": (lambda p: os.stat(p.directory), OK)},
    "destroy": {"any call": (lambda p: os.stat(p.directory), OK)},
    "getattr": {
        "stat": (lambda p: os.stat(p.file), OK),
        "stat what is not there": (lambda p: os.stat(p.new), errno.ENOENT),
        "stat below a file": (lambda p: os.stat(p.file / "below"), errno.ENOTDIR),
        "stat a long name": (lambda p: os.stat(p.directory / ("n" * 10_000)), errno.ENAMETOOLONG),
    },
    "fgetattr": {"fstat": (with_open(os.fstat), OK)},
    "access": {
        "for reading": (lambda p: _access(p.file, os.R_OK), OK),
        "for writing": (lambda p: _access(p.file, os.W_OK), errno.EROFS),
        "a directory for writing": (lambda p: _access(p.directory, os.W_OK), errno.EROFS),
        "to run": (lambda p: _access(p.file, os.X_OK), errno.EACCES),
        "what is not there": (lambda p: _access(p.new, os.R_OK), errno.ENOENT),
    },
    "readlink": {"of a file": (lambda p: os.readlink(p.file), errno.EINVAL)},
    "opendir": {
        "a directory": (with_directory(lambda d: None), OK),
        "a file": (opened(os.O_RDONLY | os.O_DIRECTORY), errno.ENOTDIR),
    },
    "readdir": {
        "a directory": (lambda p: os.listdir(p.directory), OK),
        "a file": (lambda p: os.listdir(p.file), errno.ENOTDIR),
    },
    "getdir": {"a directory": (lambda p: os.listdir(p.directory), OK)},
    "releasedir": {"a directory": (with_directory(lambda d: None), OK)},
    "fsyncdir": {"a directory": (with_directory(os.fsync), OK)},
    "statfs": {
        "a file": (lambda p: os.statvfs(p.file), OK),
        "a directory": (lambda p: os.statvfs(p.directory), OK),
        "an open file": (with_open(os.fstatvfs), OK),
    },
    "open": {
        "to read": (opened(os.O_RDONLY), OK),
        "to read past the page cache": (opened(os.O_RDONLY | os.O_DIRECT), OK),
        "to read, closed by exec, without a controlling terminal": (
            opened(os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY),
            OK,
        ),
        "to read without waiting": (opened(os.O_RDONLY | os.O_NONBLOCK), OK),
        "to read without a time of access": (opened(os.O_RDONLY | os.O_NOATIME), OK),
        "only its path": (opened(os.O_PATH), OK),
        "to read, and to make it where it is not there": (opened(os.O_RDONLY | os.O_CREAT), OK),
        "to read, and to append what is never written": (opened(os.O_RDONLY | os.O_APPEND), OK),
        "to write": (opened(os.O_WRONLY), errno.EROFS),
        "to read and write": (opened(os.O_RDWR), errno.EROFS),
        "to append": (opened(os.O_WRONLY | os.O_APPEND), errno.EROFS),
        "to read and append": (opened(os.O_RDWR | os.O_APPEND), errno.EROFS),
        "to truncate": (opened(os.O_WRONLY | os.O_TRUNC), errno.EROFS),
        "to read and truncate": (opened(os.O_RDONLY | os.O_TRUNC), errno.EROFS),
        "to write past the page cache": (opened(os.O_WRONLY | os.O_DIRECT), errno.EROFS),
        "a directory to write": (lambda p: os.close(os.open(p.directory, os.O_WRONLY)), errno.EISDIR),
        "what is not there": (opened(os.O_RDONLY, new=True), errno.ENOENT),
    },
    "create": {
        "a file": (opened(os.O_WRONLY | os.O_CREAT, new=True), errno.EROFS),
        "a file to read": (opened(os.O_RDONLY | os.O_CREAT, new=True), errno.EROFS),
        "a file that is there": (opened(os.O_WRONLY | os.O_CREAT), errno.EROFS),
        "a file that must not be there and is": (opened(os.O_WRONLY | os.O_CREAT | os.O_EXCL), errno.EEXIST),
        "a file that must not be there": (opened(os.O_WRONLY | os.O_CREAT | os.O_EXCL, new=True), errno.EROFS),
        "a file without a name": (lambda p: os.close(os.open(p.directory, os.O_TMPFILE | os.O_RDWR)), errno.EROFS),
    },
    "read": {
        "read": (with_open(lambda d: os.read(d, 10)), OK),
        "pread": (with_open(lambda d: os.pread(d, 10, 5)), OK),
        "pread behind the end": (with_open(lambda d: os.pread(d, 10, 1 << 40)), OK),
        "pread before the beginning": (with_open(lambda d: os.pread(d, 10, -1)), errno.EINVAL),
        "preadv": (with_open(lambda d: os.preadv(d, [bytearray(4), bytearray(4)], 3)), OK),
        "preadv past the page cache": (with_open(aligned_read, os.O_RDONLY | os.O_DIRECT), OK),
        "map": (with_open(lambda d: mmap.mmap(d, 10, prot=mmap.PROT_READ).close()), OK),
        "map privately to write": (with_open(lambda d: mmap.mmap(d, 10, access=mmap.ACCESS_COPY).close()), OK),
        "of a path only": (with_open(lambda d: os.read(d, 10), os.O_PATH), errno.EBADF),
        "of a directory": (with_directory(lambda d: os.read(d, 10)), errno.EISDIR),
    },
    "write": {
        "write": (with_open(lambda d: os.write(d, b"x")), errno.EBADF),
        "pwrite": (with_open(lambda d: os.pwrite(d, b"x", 0)), errno.EBADF),
        "through a map": (with_open(written_through_a_map), errno.EACCES),
        "sendfile": (with_open(lambda d: os.sendfile(d, d, 0, 10)), errno.EBADF),
    },
    "read_buf": {"splice": (with_open(lambda d: spliced(d, into=False)), OK)},
    "write_buf": {"splice": (with_open(lambda d: spliced(d, into=True)), errno.EBADF)},
    "flush": {"close": (opened(os.O_RDONLY), OK)},
    "release": {"close": (opened(os.O_RDONLY), OK)},
    "fsync": {"fsync": (with_open(os.fsync), OK), "fdatasync": (with_open(os.fdatasync), OK)},
    "lseek": {
        "to data": (with_open(lambda d: os.lseek(d, 0, os.SEEK_DATA)), OK),
        "to a hole": (with_open(lambda d: os.lseek(d, 0, os.SEEK_HOLE)), OK),
        "to data behind the end": (with_open(lambda d: os.lseek(d, 1 << 40, os.SEEK_DATA)), errno.ENXIO),
        "before the beginning": (with_open(lambda d: os.lseek(d, -1, os.SEEK_SET)), errno.EINVAL),
    },
    "mknod": {
        "a file": (lambda p: os.mknod(p.new), errno.EROFS),
        "a pipe": (lambda p: os.mkfifo(p.new), errno.EROFS),
        "a socket": (bind_socket, errno.EROFS),
        "what is there": (lambda p: os.mknod(p.file), errno.EEXIST),
    },
    "mkdir": {
        "a directory": (lambda p: os.mkdir(p.new), errno.EROFS),
        "what is there": (lambda p: os.mkdir(p.file), errno.EEXIST),
        "below what is not there": (lambda p: os.mkdir(p.new / "below"), errno.ENOENT),
    },
    "unlink": {
        "a file": (lambda p: os.unlink(p.file), errno.EROFS),
        "what is not there": (lambda p: os.unlink(p.new), errno.EROFS),
    },
    "rmdir": {
        "a file": (lambda p: os.rmdir(p.file), errno.EROFS),
        "what is not there": (lambda p: os.rmdir(p.new), errno.EROFS),
    },
    "symlink": {"a link": (lambda p: os.symlink("target", p.new), errno.EROFS)},
    "rename": {
        "a file": (lambda p: os.rename(p.file, p.new), errno.EROFS),
        "a file onto itself": (lambda p: os.rename(p.file, p.file), errno.EROFS),
        "a file for another": (lambda p: renameat2(p.file, p.new, _RENAME_EXCHANGE), errno.EROFS),
        "a file out of it": (lambda p: os.rename(p.file, "/dev/shm/new"), errno.EXDEV),
    },
    "link": {
        "a file": (lambda p: os.link(p.file, p.new), errno.EROFS),
        "what is not there": (lambda p: os.link(p.new, p.directory / "newer"), errno.ENOENT),
    },
    "chmod": {
        "a file": (lambda p: os.chmod(p.file, 0o600), errno.EROFS),
        "a directory": (lambda p: os.chmod(p.directory, 0o700), errno.EROFS),
        "an open file": (with_open(lambda d: os.fchmod(d, 0o600)), errno.EROFS),
    },
    "chown": {
        "a file": (lambda p: os.chown(p.file, 1, 1), errno.EROFS),
        "an open file": (with_open(lambda d: os.fchown(d, 1, 1)), errno.EROFS),
        "whatever it is": (lambda p: os.chown(p.file, 1, 1, follow_symlinks=False), errno.EROFS),
    },
    "truncate": {
        "a file": (lambda p: os.truncate(p.file, 0), errno.EROFS),
        "to be longer": (lambda p: os.truncate(p.file, 1 << 40), errno.EROFS),
        "a directory": (lambda p: os.truncate(p.directory, 0), errno.EISDIR),
    },
    "ftruncate": {"an open file": (with_open(lambda d: os.ftruncate(d, 0)), errno.EINVAL)},
    "utimens": {
        "now": (lambda p: os.utime(p.file), errno.EROFS),
        "then": (lambda p: os.utime(p.file, (1, 1)), errno.EROFS),
        "an open file": (with_open(lambda d: os.utime(d, (1, 1))), errno.EROFS),
    },
    "utime": {"now": (lambda p: os.utime(p.directory), errno.EROFS)},
    "listxattr": {"of a directory": (lambda p: os.listxattr(p.directory), OK)},
    "getxattr": {"one that is not there": (lambda p: os.getxattr(p.file, "user.other"), errno.ENODATA)},
    "setxattr": {
        "a new one": (lambda p: os.setxattr(p.file, "user.new", b"1"), errno.EROFS),
        "of an open file": (with_open(lambda d: os.setxattr(d, "user.new", b"1")), errno.EROFS),
    },
    "removexattr": {"one that is not there": (lambda p: os.removexattr(p.file, "user.other"), errno.EROFS)},
    "fallocate": {"an open file": (with_open(lambda d: os.posix_fallocate(d, 0, 10)), errno.EBADF)},
    "copy_file_range": {"into a file": (with_open(copied_into), errno.EBADF)},
    "ioctl": {
        "of a terminal": (with_open(lambda d: fcntl.ioctl(d, _TCGETS, bytes(64))), errno.ENOTTY),
        "the size of a block": (with_open(lambda d: fcntl.ioctl(d, _FIGETBSZ, bytes(4))), OK),
    },
    # Where a block lies is a question for root, and only where there is a disk.
    "bmap": {"the first block": (with_open(lambda d: fcntl.ioctl(d, _FIBMAP, bytes(4))), OK if _ROOT else errno.EPERM)},
    "lock": {
        "to read": (with_open(lambda d: fcntl.lockf(d, fcntl.LOCK_SH | fcntl.LOCK_NB)), OK),
        "to write": (with_open(lambda d: fcntl.lockf(d, fcntl.LOCK_EX | fcntl.LOCK_NB)), errno.EBADF),
    },
    "flock": {
        "shared": (with_open(lambda d: fcntl.flock(d, fcntl.LOCK_SH | fcntl.LOCK_NB)), OK),
        "alone": (with_open(lambda d: fcntl.flock(d, fcntl.LOCK_EX | fcntl.LOCK_NB)), OK),
    },
    "poll": {
        "poll": (with_open(polled), OK),
        "select": (with_open(lambda d: select.select([d], [], [], 0)), OK),
    },
}


def _access(path: Path, mode: int) -> None:
    """Call access; Python's gives no errno."""
    if _LIBC.access(os.fsencode(path), mode) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


CASES: Final = [(operation, what) for operation, ways in OPERATIONS.items() for what in ways]
_DEPENDS_ON_THE_DISK: Final = frozenset({"bmap"})

# What only the live tree has: links at its root, and names that make variants.
AT_THE_ROOT: Final[dict[str, tuple[Call, int]]] = {
    "look at a link": (lambda p: os.lstat(p.directory / "first"), OK),
    "read a link": (lambda p: os.readlink(p.directory / "first"), OK),
    "read a link of a variant": (lambda p: os.readlink(p.directory / "first@weight=0.5"), OK),
    "open a link itself": (lambda p: os.close(os.open(p.directory / "first", os.O_NOFOLLOW)), errno.ELOOP),
    "remove a link": (lambda p: os.unlink(p.directory / "first"), errno.EROFS),
    "remove a link as a directory": (lambda p: os.rmdir(p.directory / "first"), errno.EROFS),
    "rename a link": (lambda p: os.rename(p.directory / "first", p.new), errno.EROFS),
    "link to a link": (lambda p: os.link(p.directory / "first", p.new, follow_symlinks=False), errno.EROFS),
    "own a link": (lambda p: os.chown(p.directory / "first", 1, 1, follow_symlinks=False), errno.EROFS),
    "touch a link": (lambda p: os.utime(p.directory / "first", (1, 1), follow_symlinks=False), errno.EROFS),
    "make a variant's directory": (lambda p: os.mkdir(p.directory / "first@weight=0.5"), errno.EEXIST),
    "make the directory of plans": (lambda p: os.mkdir(p.directory / ".plans" / "new"), errno.EROFS),
    "remove the directory of plans": (lambda p: os.rmdir(p.directory / ".plans"), errno.EROFS),
    "make a file beside the models": (opened(os.O_WRONLY | os.O_CREAT, new=True), errno.EROFS),
    "make a link beside the models": (lambda p: os.symlink("first", p.new), errno.EROFS),
}


def outcome(action: Call, place: Place) -> int:
    """Return the errno with which ``action`` fails, or OK."""
    try:
        action(place)
    except OSError as error:
        assert error.errno is not None
        return error.errno
    return OK


# -- mounts -----------------------------------------------------------------------------------------------------------


def write_recipes(directory: Path, families: Families) -> Path:
    """Write a directory with two recipes and return it."""
    for name, merge in (("first", "task_arithmetic"), ("second", "linear without a base")):
        write_document(directory / f"{name}.yml", recipe_document(MERGES[merge], families(FamilyKind())))
    return directory


@dataclass(frozen=True, slots=True)
class Mounts:
    """One model mounted alone, a directory of recipes mounted, and a copy on a disk that is read-only (for root)."""

    rooted: Mount
    live: Mount
    disk: Path | None

    def places(self) -> dict[str, Place]:
        """Return where operations are tried, by name."""
        directories = {"model": self.rooted.mountpoint, "live": self.live.mountpoint / "first"}
        places = {name: Place(directory, directory / FILE) for name, directory in directories.items()}
        places["beside live models"] = Place(self.live.mountpoint, self.live.mountpoint / "first" / FILE)
        return places


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory, families: Families) -> Iterator[Mounts]:
    directory = tmp_path_factory.mktemp("operations")
    recipes = write_recipes(directory / "recipes", families)
    state, disk = directory / "state", directory / "disk"
    with (
        mounted_recipes(recipes / "first.yml", mountpoint=directory / "rooted", state=state) as rooted,
        mounted_recipes(recipes, mountpoint=directory / "live", state=state, allowed=["there is no"]) as live,
    ):
        disk.mkdir()
        if _ROOT:
            # A file system of its own, since a mount is one.
            subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
            shutil.copy(rooted.mountpoint / FILE, disk)
            (disk / FILE).chmod(0o444)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield Mounts(rooted, live, disk if _ROOT else None)
        clear_mounts_below(disk)
    assert clear_mounts_below(directory) == []


def test_every_operation_of_the_adapter_and_of_libfuse_is_in_the_table() -> None:
    ours = {name for name in vars(TreeOperations) if not name.startswith("_")} - {"use_ns", "initialised"}
    fields = {field[0] for load in LOADERS.values() for field in load().module.fuse_operations._fields_}
    assert {"getdir", "utime", "bmap", "lock", "flock", "poll", "fallocate", "copy_file_range", "lseek"} <= fields
    assert OPERATIONS.keys() == ours | {name for name in fields if not name.startswith("flag_")}


@pytest.mark.parametrize(("operation", "what"), CASES, ids=[" ".join(case) for case in CASES])
def test_an_operation_is_answered_as_a_read_only_file_system_does(mounts: Mounts, operation: str, what: str) -> None:
    action, expected = OPERATIONS[operation][what]
    found = {name: outcome(action, place) for name, place in mounts.places().items()}
    if mounts.disk is not None and operation not in _DEPENDS_ON_THE_DISK:
        found["disk"] = outcome(action, Place(mounts.disk, mounts.disk / FILE))
    assert {name: errno.errorcode.get(code, "OK") for name, code in found.items()} == dict.fromkeys(
        found, errno.errorcode.get(expected, "OK")
    )


@pytest.mark.parametrize("what", AT_THE_ROOT)
def test_links_and_variants_cannot_be_changed_either(mounts: Mounts, what: str) -> None:
    action, expected = AT_THE_ROOT[what]
    assert outcome(action, mounts.places()["beside live models"]) == expected


# -- anything at all --------------------------------------------------------------------------------------------------

VARIANTS: Final = [
    "first@weight=0.25",
    "first@budget=10%",
    "second@weight=",
    "first@@",
    "@",
    "first@colour=1",
    "x@weight=1",
]
NAMES: Final = ["first", "second", ".plans", "", ".", FILE, "model.safetensors", "ERROR.txt", "new", *VARIANTS]
ANY_BYTES: Final = st.binary(min_size=1, max_size=12).map(lambda name: os.fsdecode(name.replace(b"/", b"\xff")))
# Without "..", with which a change could be asked of what lies outside of the mount.
ANY_NAME: Final = (st.sampled_from([*NAMES, "n" * 255, "n" * 10_000, "\udcff", "nu\0l"]) | ANY_BYTES).filter(
    lambda name: name != ".."
)
ANY_PATH: Final = st.lists(ANY_NAME, max_size=4).map("/".join)
NUMBERS: Final = st.sampled_from([0, 1, 7, 0o777, 4096, 1 << 20, (1 << 31) - 1])
FLAGS: Final = st.sampled_from(
    [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_APPEND, os.O_CREAT, os.O_EXCL | os.O_CREAT, os.O_DIRECT]
    + [os.O_DIRECTORY, os.O_NOFOLLOW, os.O_PATH, os.O_SYNC, os.O_TMPFILE]
)


def read_somewhere(path: str, other: str, number: int, flags: int) -> None:
    """Open whatever it is, and read a little of it wherever that may be."""
    descriptor = os.open(path, flags & ~os.O_ACCMODE)
    try:
        os.pread(descriptor, 4096, number)
    finally:
        os.close(descriptor)


ASKING: Final[dict[str, Callable[[str, str, int, int], object]]] = {
    "stat": lambda path, other, number, flags: os.stat(path),
    "lstat": lambda path, other, number, flags: os.lstat(path),
    "list": lambda path, other, number, flags: os.listdir(path),
    "readlink": lambda path, other, number, flags: os.readlink(path),
    "access": lambda path, other, number, flags: _access(Path(path), number & 7),
    "statvfs": lambda path, other, number, flags: os.statvfs(path),
    "listxattr": lambda path, other, number, flags: os.listxattr(path),
    "getxattr": lambda path, other, number, flags: os.getxattr(path, f"user.{other}"[:200]),
    "read": read_somewhere,
}
CHANGING: Final[dict[str, Callable[[str, str, int, int], object]]] = {
    "write": lambda path, other, number, flags: os.open(path, flags & ~os.O_PATH | os.O_WRONLY),
    "create": lambda path, other, number, flags: os.open(
        path, flags & ~os.O_PATH | os.O_CREAT | os.O_EXCL, number & 0o777
    ),
    "mknod": lambda path, other, number, flags: os.mknod(path, number),
    "mkdir": lambda path, other, number, flags: os.mkdir(path, number & 0o777),
    "unlink": lambda path, other, number, flags: os.unlink(path),
    "rmdir": lambda path, other, number, flags: os.rmdir(path),
    "symlink": lambda path, other, number, flags: os.symlink(other, path),
    "rename": lambda path, other, number, flags: os.rename(path, other),
    "link": lambda path, other, number, flags: os.link(path, other),
    "chmod": lambda path, other, number, flags: os.chmod(path, number & 0o777),
    "chown": lambda path, other, number, flags: os.chown(path, number, number),
    "truncate": lambda path, other, number, flags: os.truncate(path, number),
    "utime": lambda path, other, number, flags: os.utime(path, (number, number)),
    "setxattr": lambda path, other, number, flags: os.setxattr(path, f"user.{other}"[:200], b"1"),
    "removexattr": lambda path, other, number, flags: os.removexattr(path, f"user.{other}"[:200]),
}
CALLS: Final = st.lists(
    st.tuples(st.sampled_from([*ASKING, *CHANGING]), ANY_PATH, ANY_PATH, NUMBERS, FLAGS), min_size=1, max_size=12
)
_NEVER: Final = {errno.EIO, errno.ENOTCONN, errno.ENOSYS, errno.ESTALE}
"""What says that the server has gone, or has stumbled."""


@settings(max_examples=100)
@given(calls=CALLS)
def test_no_call_on_any_path_changes_anything_or_upsets_the_server(
    mounts: Mounts, calls: list[tuple[str, str, str, int, int]]
) -> None:
    root = mounts.live.mountpoint
    for name, path, other, number, flags in calls:
        # With the dot the last name is never that of the mount point, which belongs to the file system that it lies in.
        arguments = (f"{root}/./{path}", f"{root}/./{other}", number, flags)
        try:
            ASKING[name](*arguments) if name in ASKING else CHANGING[name](*arguments)
        except OSError as error:
            assert error.errno not in _NEVER, (name, arguments)
        except ValueError as error:
            assert "null" in str(error)
        else:
            assert name in ASKING, (name, arguments)


def test_after_all_that_the_server_lives_and_its_log_has_no_traceback(mounts: Mounts) -> None:
    assert is_running(mounts.live.pid)
    assert os.listdir(mounts.live.mountpoint) == ["first", "second"]
    assert (mounts.live.mountpoint / "first" / FILE).read_bytes() == (mounts.rooted.mountpoint / FILE).read_bytes()
    assert "Traceback" not in mounts.live.log()
    assert " ERROR " not in mounts.live.log()


class _Tracebacks(logging.Handler):
    """Keeps the records that are about an exception nobody expected."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.records.append(self.format(record))


@pytest.fixture(scope="module")
def operations(
    tmp_path_factory: pytest.TempPathFactory, families: Families, catalogs: Path
) -> Iterator[tuple[TreeOperations, _Tracebacks]]:
    directory = tmp_path_factory.mktemp("in-process")
    tree = build_tree((write_recipes(directory, families),), BuildOptions(catalog=catalogs / directory.name))
    tracebacks = _Tracebacks()
    logging.getLogger("mergefs").addHandler(tracebacks)
    yield TreeOperations(tree, directory / "mnt"), tracebacks
    logging.getLogger("mergefs").removeHandler(tracebacks)
    tree.close()


# As the binding gives paths: each byte a character.
WIRE: Final = st.lists(ANY_NAME | st.just(".."), max_size=4).map(
    lambda names: os.fsencode("/" + "/".join(names)).decode("latin-1")
)


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_reaches_the_adapter_is_answered_or_refused_with_an_errno(
    operations: tuple[TreeOperations, _Tracebacks], data: st.DataObject
) -> None:
    adapter, tracebacks = operations
    tracebacks.records.clear()
    name = data.draw(st.sampled_from(sorted(OPERATIONS.keys() & set(dir(TreeOperations)))))
    operation: Callable[..., Any] = getattr(adapter, name)
    handle = adapter.open(f"/.plans/{adapter.readlink('/first').rpartition('/')[2]}/{FILE}", os.O_RDONLY)
    kinds: dict[str, st.SearchStrategy[Any]] = {
        **dict.fromkeys(("path", "old", "new", "target", "source"), WIRE),
        "name": ANY_NAME.map(lambda name: os.fsencode(name).decode("latin-1")),
        "data": st.binary(max_size=8),
        "value": st.binary(max_size=8),
        "fh": st.just(handle),
        "flags": FLAGS,
    }
    arguments = [data.draw(kinds.get(one, NUMBERS)) for one in inspect.signature(operation).parameters]
    try:
        operation(*arguments)
    except OSError as error:
        assert error.errno == answerable(error.errno)
        assert error.errno != errno.EIO
    if name != "release":
        adapter.release("", handle)
    assert tracebacks.records == []


# -- other users ------------------------------------------------------------------------------------------------------


def as_nobody(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user who is nobody."""
    if _ROOT:
        change = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    elif subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0:
        change = ["sudo", "-n", "-u", "nobody"]
    else:
        pytest.skip("only root can try what other users can do")
    return subprocess.run([*change, *map(str, command)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("allowed", [False, True])
def test_other_users_see_nothing_unless_they_are_let_in(tmp_path: Path, families: Families, allowed: bool) -> None:
    recipes = write_recipes(tmp_path / "recipes", families)
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # everybody may come as far as the mount
        mountpoint = Path(place) / "mnt"
        options = ["--allow-other"] if allowed else []
        with mounted_recipes(recipes, mountpoint=mountpoint, state=tmp_path / "state", options=options):
            commands = (
                ["ls", mountpoint],
                ["cat", mountpoint / "first" / FILE],
                ["stat", mountpoint / "first@weight=2"],
            )
            assert as_nobody("ls", place).returncode == 0
            for command in commands:
                seen = as_nobody(*command)
                assert (seen.returncode == 0) is allowed, seen.stderr
                assert allowed or "Permission denied" in seen.stderr
            assert (mountpoint / "first" / FILE).exists()
