"""The options that stand before the command, for every command."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``mergefs --catalog DIR --verbose --log-file FILE`` says; commands find it in ``ctx.obj``.

    The paths are absolute, so that they survive a change of the working directory.
    """

    catalog: Path | None
    verbose: bool
    log_file: Path | None


def absolute(path: Path) -> Path:
    """Return ``path`` absolute and without ``..``; symbolic links are kept."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps "..")
