"""Whether a model may be written to a place: what must not be in its way, and what must not be in its."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mergefs.errors import MaterializeError
from mergefs.materialize.manifest import MANIFEST_NAME
from mergefs.units import format_size

_MARGIN: Final = 16 * 2**20
"""Room for directory entries, the journal and the manifest, beside the files themselves."""


def check_place(destination: Path, sources: Sequence[Path], kept: Sequence[Path]) -> None:
    """Refuse a destination that is tangled with a source, or that ``kept`` files lie in."""
    try:
        _refuse_tangled(destination, sources, kept)
    except OSError as error:
        raise _unusable(destination, error) from None


def _refuse_tangled(destination: Path, sources: Sequence[Path], kept: Sequence[Path]) -> None:
    resolved = destination.resolve()
    for source in sources:
        if resolved == source or source.is_relative_to(resolved) or resolved.is_relative_to(source):
            raise MaterializeError(
                f"{destination}: is tangled with the source {source}, which must stay as it is; choose another place"
            )
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise MaterializeError(f"{destination}: is not a directory; choose another place")
    for path in kept:
        if path.resolve().is_relative_to(resolved):
            raise MaterializeError(f"{destination}: holds {path}, which must stay as it is; choose another place")
    if destination.is_mount():
        raise MaterializeError(f"{destination}: is a mount point; choose a directory below it")


def check_contents(destination: Path, overwrite: bool) -> None:
    """Refuse a destination that has something in it, unless that is a model that may be replaced."""
    try:
        if not destination.is_dir() or not any(destination.iterdir()):
            return
    except OSError as error:
        raise _unusable(destination, error) from None
    if not overwrite:
        raise MaterializeError(
            f"{destination}: exists and is not empty; choose another place, or replace it with --overwrite"
        )
    if not any((destination / name).is_file() for name in (MANIFEST_NAME, "config.json")):
        raise MaterializeError(
            f"{destination}: is no model (it has neither {MANIFEST_NAME} nor config.json), and --overwrite replaces "
            "models only; choose another place, or empty the directory yourself"
        )


def _unusable(destination: Path, error: OSError) -> MaterializeError:
    """Return the error for a destination that cannot be looked at."""
    return MaterializeError(f"{destination}: cannot be used ({error.strerror}); choose another place")


def check_space(destination: Path, needed: int) -> None:
    """Refuse to begin what cannot fit on the disk."""
    room = os.statvfs(destination.parent)
    free = room.f_bavail * room.f_frsize
    if free < needed + _MARGIN:
        raise MaterializeError(
            f"{destination}: needs {format_size(needed)} and the disk has {format_size(free)} free; free some space or "
            "choose another place"
        )
