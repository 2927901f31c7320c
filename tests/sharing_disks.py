"""Disks whose files can share blocks: real file systems in files of their own."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SHARING: Final = ("xfs", "btrfs")
"""The file systems of the kernel that can."""
_IMAGE_BYTES: Final = 400 * 2**20
"""The smallest XFS has 300 MiB. Hardly any of it takes room."""


@contextmanager
def sharing_disk(directory: Path, kind: str) -> Iterator[Path]:
    """Mount a new file system of a ``kind`` below ``directory``, and return where."""
    directory.mkdir(parents=True, exist_ok=True)
    image, place = directory / f"{kind}.image", directory / kind
    with image.open("wb") as file:
        file.truncate(_IMAGE_BYTES)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    place.mkdir()
    mount(image, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        image.unlink()


def mount(image: Path, place: Path) -> None:
    """Mount the file system in a file."""
    subprocess.run(["mount", "-o", "loop", image, place], check=True)


def lose_power(directory: Path) -> None:
    """Let an XFS below ``directory`` lose all that is not on its disk yet, and mount it again."""
    place = directory / "xfs"
    subprocess.run(["xfs_io", "-x", "-c", "shutdown", place], check=True)
    subprocess.run(["umount", place], check=True)
    mount(directory / "xfs.image", place)
