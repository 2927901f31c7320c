"""The log of a server, and of failures: where it is kept, and how logging is set up to write it."""

import contextlib
import logging
import os
import re
import sys
from pathlib import Path
from typing import Final

from mergefs.errors import MountError

_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


# What this module has added to the root logger, so that it removes nothing else.
_installed: Final[list[logging.Handler]] = []


class _LineFormatter(logging.Formatter):
    """Records as one line each, but for a traceback: names of files and variants may hold what looks like more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name is logging's)
        characters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in record.message)
        record.message = record.message if record.message.isprintable() else "".join(characters)
        return super().formatMessage(record)


class _LogFile(logging.FileHandler):
    """A log file. On a full disk its records are lost, which is said once, and nothing else is."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        """Say that records are lost: logging would print a traceback for each."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            said = f"cannot write the log file {self.baseFilename}: {error.strerror}; free some space on its disk"
            with contextlib.suppress(OSError):
                print(f"mergefs: warning: {said}", file=sys.stderr)

    def close(self) -> None:
        """Close the file, though what it still had to write is lost."""
        with contextlib.suppress(OSError):
            super().close()


class _SentenceFormatter(_LineFormatter):
    """Records for people: ``mergefs: warning: ...``."""

    def format(self, record: logging.LogRecord) -> str:
        return f"mergefs: {record.levelname.lower()}: {super().format(record)}"


def log_directory() -> Path:
    """Return the directory for log files, made if need be; a new temporary one when the user's cannot be written."""
    try:
        base = os.environ.get("XDG_STATE_HOME")
        state = Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "state"
        directory = state / "mergefs" / "log"
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        pass
    import tempfile

    return Path(tempfile.mkdtemp(prefix="mergefs-log-"))


def default_log_file(name: str) -> Path:
    """Return the path of this process's log file; ``name`` says for people what it is about."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:100] or "root"
    return log_directory() / f"{safe}-{os.getpid()}.log"


def summary(error: BaseException) -> str:
    """Return the kind of ``error`` and the beginning of what it says, on one line: some say very much."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}" if text else type(error).__name__


def set_levels(verbose: bool) -> None:
    """Let through what is ours from INFO (DEBUG when ``verbose``) and warnings of everybody else."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("mergefs").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)


def add_file(path: Path) -> logging.Handler:
    """Write all records to the file ``path`` too. Raises MountError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path)
    except OSError as error:
        raise MountError(f"cannot write the log file {path}: {error.strerror}; name another with --log-file") from error
    handler.setFormatter(_LineFormatter(_FORMAT))
    return _install(handler)


def add_terminal(level: int) -> logging.Handler:
    """Write records from ``level`` on to stderr as sentences for people."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(_SentenceFormatter("%(message)s"))
    return _install(handler)


def add_stream() -> logging.Handler:
    """Write all records to stderr as a log, for a server in the foreground."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(_FORMAT))
    return _install(handler)


def add_void() -> logging.Handler:
    """Let records go that no other handler takes; Python would print them."""
    return _install(logging.NullHandler())


def _install(handler: logging.Handler) -> logging.Handler:
    """Give all records to ``handler``."""
    logging.getLogger().addHandler(handler)
    _installed.append(handler)
    return handler


def remove_handler(handler: logging.Handler) -> None:
    """Give no more records to ``handler``, and close it."""
    logging.getLogger().removeHandler(handler)
    if handler in _installed:
        _installed.remove(handler)
        with contextlib.suppress(OSError):
            handler.close()


def current_file() -> Path | None:
    """Return the file that records are written to, or None."""
    files = (handler for handler in _installed if isinstance(handler, logging.FileHandler))
    return next((Path(handler.baseFilename) for handler in files), None)


def remove_handlers() -> None:
    """Forget every handler that this module has set up, and close their files."""
    for handler in list(_installed):
        remove_handler(handler)
