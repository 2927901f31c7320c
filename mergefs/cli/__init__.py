"""The command line: one thin command for each capability, and one rule for errors."""

import atexit
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from mergefs.errors import MergefsError

__all__ = ["main"]

_INTERRUPTED = 130

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""More than a command makes until it begins with its work: nearly all of them stay until its end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 a clear error on stderr, 2 wrong usage, 130 Ctrl-C.

    ``arguments`` are those of the process when left out. No traceback reaches the user, except with ``--verbose``.
    """
    if arguments is None:
        _own_the_process()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = _run(given)
        # A full disk, or a reader that has gone, shows here and not at the interpreter's end.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return _leave_broken_pipe()
    except Exception as error:
        return _report_bug(error, given)
    finally:
        _close_logs()


def _own_the_process() -> None:
    """Let Python look for garbage less often than by default, and not at all at its end.

    Looking through what was imported and planned, in vain, takes longer than a small merge; at the end the system takes
    all memory at once.
    """
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(gc.freeze)


def _run(arguments: list[str]) -> int:
    """Run one command and turn the errors that are meant for people into an exit status."""
    from mergefs.cli.group import cli
    from mergefs.cli.mount_helper import translate_helper_call

    try:
        arguments = translate_helper_call(arguments) or arguments
        result = cli.main(args=arguments, prog_name="mergefs", standalone_mode=False)
    except MergefsError as error:
        _say(f"error: {error}")
        return error.exit_status
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _say(f"error: {error.format_message()}")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return _INTERRUPTED
    return result if isinstance(result, int) else 0


def _close_logs() -> None:
    """Close the logs that the command opened, if it came that far."""
    logs = sys.modules.get("mergefs.mount.logs")
    if logs is not None:
        logs.remove_handlers()


def _say(sentence: str) -> None:
    """Print a sentence for people on stderr."""
    click.echo(f"mergefs: {sentence}", err=True)


def _leave_broken_pipe() -> int:
    """Give up quietly, as programs do whose output nobody reads any more."""
    import os

    # The interpreter flushes stdout once more at its end, which must not raise again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _report_bug(error: Exception, arguments: list[str]) -> int:
    """Say in one sentence whose mistake this is, ours or another package's, and where the details are."""
    import traceback

    from mergefs.mount.logs import summary

    details = "".join(traceback.format_exception(error))
    if {"-v", "--verbose"} & set(arguments):
        click.echo(details, err=True, nl=False)
    try:
        where = f"and {_write_details(details, arguments)} has the details"
    except OSError:
        where = "and `mergefs --verbose` shows the details"
    # Only where methods were looked at: whoever fails before has loaded none.
    plugins = sys.modules.get("mergefs.methods.plugins")
    origin = None if plugins is None else plugins.blamed_for(error)
    what = "internal error" if origin is None else f"a merge method of {origin} failed"
    whose = "" if origin is None else " of that package"
    _say(f"error: {what} ({summary(error)}); this is a bug{whose}, {where}")
    return 1


def _write_details(details: str, arguments: list[str]) -> Path:
    """Append the traceback to the log file of this run and return its path. Raises OSError."""
    from mergefs.mount.logs import current_file, default_log_file

    path = current_file() or default_log_file("internal-error")
    with path.open("a", encoding="utf-8", errors="backslashreplace") as log:
        log.write(f"mergefs {' '.join(arguments)}\n{details}")
    return path
