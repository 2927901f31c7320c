"""What is checked before anything slow is done: the directory to mount on, and the device that makes FUSE possible."""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mergefs.errors import MountError
from mergefs.mount.bindings import WITHOUT_FUSE
from mergefs.mount.mountinfo import FILESYSTEM, find_mount, state

_DEVICE: Final = Path("/dev/fuse")


def crashed_mount_message(mountpoint: Path) -> str:
    """Return the sentence for a mount whose server is gone."""
    return f"{mountpoint} is a crashed mount whose server is gone; run `mergefs umount {mountpoint}` to clear it"


def check_mountpoint(mountpoint: Path) -> None:
    """Check that ``mountpoint`` (absolute, without symbolic links) can be mounted on.

    Raises MountError unless it is an existing, readable, empty directory that is not a mount point already.
    """
    entry = find_mount(mountpoint)
    if entry is not None:
        if entry.filesystem != FILESYSTEM:
            raise MountError(
                f"{mountpoint} is already a mount point ({entry.filesystem}); mount on an empty directory, "
                "for example on a new one below it"
            )
        if state(entry) == "crashed":
            raise MountError(crashed_mount_message(mountpoint))
        raise MountError(
            f"{mountpoint} is already a mount of mergefs; run `mergefs umount {mountpoint}` first, or mount elsewhere"
        )
    try:
        is_directory = stat.S_ISDIR(mountpoint.stat().st_mode)
        is_empty = not is_directory or not os.listdir(mountpoint)  # noqa: PTH208 (all or nothing, without an iterator)
    except OSError as error:
        raise MountError(_unusable(mountpoint, error)) from error
    if not is_directory:
        raise MountError(f"the mount point {mountpoint} is not a directory; name an empty directory")
    if not is_empty:
        raise MountError(
            f"the mount point {mountpoint} is not empty, and a mount would hide what is in it; name an empty directory"
        )


def _unusable(mountpoint: Path, error: OSError) -> str:
    """Return the sentence for a mount point that could not be looked at."""
    if error.errno == errno.ENOENT:
        return f"the mount point {mountpoint} does not exist; make it with `mkdir -p {mountpoint}`"
    if error.errno == errno.ENOTCONN:
        return f"the mount point {mountpoint} lies in a crashed FUSE mount; unmount that first"
    return f"the mount point {mountpoint} cannot be used: {error.strerror}; name an empty directory of your own"


def check_device() -> None:
    """Check that FUSE can be used at all. Raises MountError, which says what to use instead."""
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            remedy = (
                "load the kernel module with `modprobe fuse`, or start the container with "
                "`--device /dev/fuse --cap-add SYS_ADMIN`"
            )
        else:
            remedy = "let this user read and write it, or start the container with `--device /dev/fuse`"
        raise MountError(f"cannot open {_DEVICE} ({error.strerror}): {remedy}; {WITHOUT_FUSE}") from error


def refuse_catalog_inside(mountpoint: Path, catalog: Path) -> None:
    """Refuse a mount that would hide the catalog, which is written to as long as the mount lasts. Raises MountError."""
    if Path(os.path.realpath(catalog)).is_relative_to(os.path.realpath(mountpoint)):
        raise MountError(
            f"the catalog {catalog} lies inside the mount point {mountpoint}, which would hide it; name another "
            "directory with --catalog, or mount elsewhere"
        )


def refuse_sources_inside(mountpoint: Path, sources: Iterable[Path]) -> None:
    """Refuse a mount that would hide its own sources, or that would lie among them.

    ``sources`` are the files and directories that the tree reads later. Raises MountError when one lies inside
    ``mountpoint``, or when ``mountpoint`` lies inside one.
    """
    target = Path(os.path.realpath(mountpoint))
    for source in sources:
        resolved = Path(os.path.realpath(source))
        if resolved.is_relative_to(target):
            raise MountError(
                f"the source {source} lies inside the mount point {mountpoint}, which would hide it; mount elsewhere"
            )
        if target.is_relative_to(resolved):
            raise MountError(
                f"the mount point {mountpoint} lies inside the source {source}; mount outside of the models"
            )
