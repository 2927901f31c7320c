"""Taking a mount away: the system call or fusermount, who holds a busy one, and waiting for the server to end."""

import contextlib
import ctypes
import errno
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergefs.errors import MountError
from mergefs.mount.mountinfo import (
    FILESYSTEM,
    MountEntry,
    all_mounts,
    find_mount,
    list_mounts,
    resolve_mountpoint,
    state,
    within_deadline,
)
from mergefs.mount.tree import STATUS_ATTRIBUTE

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_SERVER_DEADLINE: Final = 30.0
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a mount busy. ``how`` says with what, such as ``an open file``, and ``path`` with which."""

    pid: int
    command: str
    how: str
    path: str

    def __str__(self) -> str:
        """Return what people read, in one line whatever the names are."""
        text = f"{self.command} (pid {self.pid}, {self.how} {self.path})"
        return "".join(character if character.isprintable() else "?" for character in text)


def read_status(entry: MountEntry, seconds: float = 5.0) -> dict[str, object]:
    """Return the status object of a live mount.

    Raises OSError when the server does not give it, TimeoutError when it does not answer within ``seconds``, and
    ValueError when it is no JSON object.
    """
    raw = within_deadline(lambda: os.getxattr(entry.mountpoint, STATUS_ATTRIBUTE), seconds)
    status = json.loads(raw)
    if not isinstance(status, dict):
        raise ValueError(f"the status of {entry.mountpoint} is not an object")
    return status


def unmount(path: Path, *, lazy: bool = False) -> None:
    """Unmount the mergefs mount at ``path`` and return when it is gone, and its server process too.

    ``lazy`` takes it out of the directory tree at once and leaves it to those who still use it; then the server lives
    on until the last of them is done and is not waited for. A crashed mount is cleared whoever still holds it. Raises
    MountError when there is no mergefs mount, when it is busy, or when unmounting is not allowed.
    """
    mountpoint = resolve_mountpoint(path)
    entry = find_mount(mountpoint)
    if entry is None:
        raise MountError(f"{path} is not a mount point; `mergefs status` lists the mounts")
    if entry.filesystem != FILESYSTEM:
        raise MountError(f"{path} is a mount of type {entry.filesystem}, not of mergefs, and is left alone")
    crashed = state(entry) == "crashed"
    server = None if crashed or lazy else _server(entry)
    try:
        detach(entry, lazy=lazy or crashed)
        if server is not None:
            _wait_for_end(server, mountpoint)
    finally:
        if server is not None:
            os.close(server)


def detach(entry: MountEntry, *, lazy: bool) -> None:
    """Ask the kernel to unmount ``entry``. Raises MountError, which names the holders of a busy mount."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        if libc.umount2(os.fsencode(entry.mountpoint), flags) == 0:
            return
        code = ctypes.get_errno()
        if code == errno.EBUSY:
            raise MountError(_busy_message(entry))
        if code != errno.EPERM:
            raise MountError(f"cannot unmount {entry.mountpoint}: {os.strerror(code)}")
    _run_fusermount(entry, lazy)


def _run_fusermount(entry: MountEntry, lazy: bool) -> None:
    """Unmount with the setuid helper, as an ordinary user has to."""
    helper = shutil.which("fusermount3") or shutil.which("fusermount")
    if helper is None:
        raise MountError(
            f"cannot unmount {entry.mountpoint}: fusermount is not installed; "
            "install it with `apt-get install fuse3` or `dnf install fuse`"
        )
    command = [helper, "-u", *(["-z"] if lazy else []), str(entry.mountpoint)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode == 0:
        return
    if "busy" in result.stderr:
        raise MountError(_busy_message(entry))
    raise MountError(f"cannot unmount {entry.mountpoint}: {result.stderr.strip() or f'{helper} failed'}")


def _busy_message(entry: MountEntry) -> str:
    """Return the sentence for a busy mount."""
    remedy = f"end them, or run `mergefs umount --lazy {entry.mountpoint}`"
    held = [str(holder) for holder in find_holders(entry)]
    held += [f"the mount on {other.mountpoint}" for other in all_mounts() if _lies_below(other, entry)]
    if not held:
        return f"{entry.mountpoint} is busy, held by processes that this user may not look at; {remedy}"
    shown = ", ".join(held[:10]) + (f" and {len(held) - 10} more" if len(held) > 10 else "")
    return f"{entry.mountpoint} is busy, held by {shown}; {remedy}"


def _lies_below(other: MountEntry, entry: MountEntry) -> bool:
    """Return whether ``other`` is mounted on a directory of ``entry``."""
    return other.mountpoint != entry.mountpoint and other.mountpoint.is_relative_to(entry.mountpoint)


def find_holders(entry: MountEntry) -> tuple[Holder, ...]:
    """Return the processes that keep ``entry`` busy, as far as this user may see."""
    holders = []
    for directory in _PROC.iterdir():
        if not directory.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # a process that has ended, or one of another user
            held = _what_is_held(directory, entry)
            if held is not None:
                command = (directory / "comm").read_text(errors="replace").strip()
                holders.append(Holder(int(directory.name), command, *held))
    return tuple(sorted(holders, key=lambda holder: holder.pid))


def _what_is_held(process: Path, entry: MountEntry) -> tuple[str, str] | None:
    """Return how ``process``, a directory of /proc, holds ``entry``, and which path. Never asks the mount itself."""
    for link, how in (("cwd", "its working directory"), ("root", "its root directory")):
        if path := _target_inside(process / link, entry.mountpoint):
            return how, path
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            if path := _target_inside(descriptor, entry.mountpoint):
                return "an open file", path
    major, minor = (int(part) for part in entry.device.split(":"))
    device = f"{major:02x}:{minor:02x}"
    with (process / "maps").open("rb") as maps:
        for line in maps:
            # Addresses, permissions, offset, device, inode, path.
            fields = line.rstrip(b"\n").split(None, 5)
            if fields[3].decode("ascii") == device:
                return "a mapped file", os.fsdecode(fields[5]) if len(fields) > 5 else ""
    return None


def _target_inside(link: Path, mountpoint: Path) -> str | None:
    """Return where the /proc link leads, by its text alone, if that is ``mountpoint`` or below it."""
    try:
        target = os.readlink(link)  # noqa: PTH115 (Path.readlink is the same, and slower)
    except OSError:
        return None
    return target if Path(target).is_relative_to(mountpoint) else None


def _server(entry: MountEntry) -> int | None:
    """Return a pidfd of the process that serves ``entry``, or None when it cannot be had.

    Raises MountError when the server does not answer: the question then keeps the mount busy as long as it is open.
    """
    try:
        pid = read_status(entry).get("pid")
        if isinstance(pid, int) and _serves_fuse(pid):
            return os.pidfd_open(pid)
    except TimeoutError:
        raise MountError(
            f"the server of {entry.mountpoint} does not answer, so that it cannot be asked to end; "
            f"run `mergefs umount --lazy {entry.mountpoint}`"
        ) from None
    except (OSError, ValueError):
        pass
    return None


def _serves_fuse(pid: int) -> bool:
    """Return whether the process has /dev/fuse open: a number from another PID namespace names somebody else."""
    for descriptor in (_PROC / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == "/dev/fuse":  # noqa: PTH115
                return True
    return False


def _wait_for_end(server: int, mountpoint: Path) -> None:
    """Wait until the process behind the pidfd ``server`` has ended."""
    poll = select.poll()
    poll.register(server, select.POLLIN)
    deadline = time.monotonic() + _SERVER_DEADLINE
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            return
    raise MountError(
        f"{mountpoint} is unmounted, but its server has not ended within {_SERVER_DEADLINE:.0f} s: a read may still be "
        "going on, or another mount namespace, such as a container's, still has the mount"
    )


def shown_plans() -> frozenset[str]:
    """Return the ids of the plans that the mounts of this machine show, as far as their servers answer."""
    found: set[str] = set()
    for entry in list_mounts():
        with contextlib.suppress(OSError, ValueError):
            plans = read_status(entry).get("plan_ids", [])
            found.update(map(str, plans if isinstance(plans, list) else []))
    return frozenset(found)
