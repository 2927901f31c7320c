"""The mounts of this machine as the kernel lists them, which works where ``stat`` on a crashed mount does not."""

import errno
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

FILESYSTEM: Final = "fuse.mergefs"

State = Literal["live", "crashed", "stuck"]

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of ``/proc/self/mountinfo``. ``device`` is ``major:minor``; ``options`` are the mount's and the
    superblock's."""

    mount_id: int
    device: str
    mountpoint: Path
    filesystem: str
    source: str
    options: tuple[str, ...]


def _unescape(field: bytes) -> str:
    """Return ``field`` with its octal escapes decoded."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def parse_mountinfo(content: bytes) -> tuple[MountEntry, ...]:
    """Return the entries of a mountinfo file in the kernel's order, so that a later mount hides an earlier one."""
    entries = []
    for line in content.split(b"\n")[:-1]:  # not splitlines: a path may hold a carriage return
        fields = line.split(b" ")
        separator = fields.index(b"-", 6)  # optional fields stand between the sixth and the separator
        filesystem, source, superblock = fields[separator + 1 : separator + 4]
        entries.append(
            MountEntry(
                mount_id=int(fields[0]),
                device=fields[2].decode("ascii"),
                mountpoint=Path(_unescape(fields[4])),
                filesystem=_unescape(filesystem),
                source=_unescape(source),
                options=tuple(_unescape(fields[5] + b"," + superblock).split(",")),
            )
        )
    return tuple(entries)


def all_mounts() -> tuple[MountEntry, ...]:
    """Return every mount that this process can see."""
    return parse_mountinfo(_MOUNTINFO.read_bytes())


def list_mounts() -> tuple[MountEntry, ...]:
    """Return the mounts of mergefs, live or crashed."""
    return tuple(entry for entry in all_mounts() if entry.filesystem == FILESYSTEM)


def find_mount(path: Path) -> MountEntry | None:
    """Return the topmost mount whose mount point is ``path``, or None. Never asks the mounted file system itself."""
    resolved = resolve_mountpoint(path)
    return next((entry for entry in reversed(all_mounts()) if entry.mountpoint == resolved), None)


def resolve_mountpoint(path: Path) -> Path:
    """Return ``path`` absolute and without symbolic links, without asking a file system that is mounted there."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps "..")
    known = {entry.mountpoint for entry in all_mounts()}
    return absolute if absolute in known else Path(os.path.realpath(path))


def within_deadline(function: Callable[[], _Result], seconds: float) -> _Result:
    """Return what ``function`` returns, or raise what it raises; TimeoutError when it takes longer than ``seconds``.

    For system calls that wait for a server which may never answer: the call goes on in a thread that nobody waits for
    and that ends with the process.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="deadline", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return results[0]


def state(entry: MountEntry, seconds: float = 3.0) -> State:
    """Return whether the server behind ``entry`` answers, is gone (``crashed``), or is silent for ``seconds``."""
    try:
        # statvfs always asks the server, while stat may be answered from the kernel's cache for a while.
        within_deadline(lambda: os.statvfs(entry.mountpoint), seconds)
    except TimeoutError:
        return "stuck"
    except OSError as error:
        # Other errors are answers too: a server's own, or the kernel's EACCES for a mount of another user.
        return "crashed" if error.errno == errno.ENOTCONN else "live"
    return "live"
