"""Mounts for the demo, made with the command that users type."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergefs.errors import MountError
from mergefs.mount.mountinfo import list_mounts
from mergefs.mount.tree import STATUS_ATTRIBUTE


@contextmanager
def mounted(recipe: Path, mountpoint: Path, catalog: Path, budget: str) -> Iterator[Path]:
    """Mount ``recipe`` at ``mountpoint`` with ``mergefs mount``, and take it away afterwards.

    A mount that an interrupted demo left there is taken away first. Raises MountError with what the command said when
    it fails.
    """
    mountpoint = mountpoint.resolve()
    if any(entry.mountpoint == mountpoint for entry in list_mounts()):
        _run(catalog, "umount", "--lazy", str(mountpoint))
    mountpoint.mkdir(parents=True, exist_ok=True)
    _run(catalog, "mount", str(recipe), str(mountpoint), "--budget", budget)
    try:
        yield mountpoint
    except BaseException:
        # Whatever failed may still hold files open, and its error is the one to tell.
        with contextlib.suppress(MountError):
            _run(catalog, "umount", "--lazy", str(mountpoint))
        raise
    _run(catalog, "umount", str(mountpoint))


def mount_status(mountpoint: Path) -> Mapping[str, Any]:
    """Return what the mount says of itself, as ``mergefs status --json`` shows it."""
    status: Mapping[str, Any] = json.loads(os.getxattr(mountpoint, STATUS_ATTRIBUTE))
    return status


def _run(catalog: Path, *arguments: str) -> None:
    """Run one mergefs command."""
    command = [sys.executable, "-m", "mergefs", "--catalog", str(catalog), *arguments]
    # The daemon inherits what it is given, so pipes would keep this process waiting for it.
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123 (os.devnull is no place in a tree)
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=nothing, stderr=subprocess.PIPE, check=False)
    if result.returncode != 0:
        said = result.stderr.decode(errors="replace").strip().removeprefix("mergefs: error: ")
        raise MountError(said or f"mergefs {arguments[0]} ended with exit status {result.returncode}")
