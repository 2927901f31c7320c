"""The options that stand before the command, for every command."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``mergefs --catalog DIR --verbose --log-file FILE`` says; commands find it in ``ctx.obj``.

    The paths are absolute, so that they survive a change of the working directory. A command's own ``-v`` and ``-q``
    change ``verbose`` and ``quiet``.
    """

    catalog: Path | None
    verbose: bool
    log_file: Path | None
    quiet: bool = False


def start_logs(settings: Settings, command: str | None) -> None:
    """Let records go to stderr and to the log file, as ``settings`` say, from here on."""
    import logging

    from mergefs.mount import logs

    logs.remove_handlers()
    logs.set_levels(settings.verbose)
    logs.add_terminal(logging.DEBUG if settings.verbose else logging.WARNING)
    # A mount opens its log itself, in the process that serves it.
    if settings.log_file is not None and command != "mount":
        logs.add_file(settings.log_file)


def absolute(path: Path) -> Path:
    """Return ``path`` absolute and without ``..``; symbolic links are kept."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps "..")
