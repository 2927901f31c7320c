"""Starting a server: in the foreground, or as a daemon whose start is complete when its mount answers.

The fork comes before anything heavy is imported or built, because threads and open databases do not survive one, and
libfuse never daemonizes itself. Keep this module, and what it imports, light.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from mergefs.errors import MergefsError, MountError
from mergefs.mount import bindings, logs
from mergefs.mount.handshake import Outcome, Speaker, listen
from mergefs.mount.mountinfo import FILESYSTEM, find_mount, resolve_mountpoint
from mergefs.mount.mountpoint import check_device, check_mountpoint, refuse_sources_inside
from mergefs.mount.notify import notify
from mergefs.mount.session import serve_tree
from mergefs.mount.tree import Tree
from mergefs.mount.unmount import detach

__all__ = ["MountOptions", "refuse_sources_inside", "serve"]

_log = logging.getLogger("mergefs.mount")

_STOPPING_DEADLINE: Final = 10.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount. ``log_file`` None means a file of its own in the user's state directory, or stderr in the
    foreground. ``source`` is what the list of mounts names as what is mounted."""

    mountpoint: Path
    foreground: bool
    allow_other: bool
    log_file: Path | None
    verbose: bool
    source: str = bindings.SOURCE


class _StoppedError(BaseException):
    """A signal asks to give up while the mount is being prepared. Like KeyboardInterrupt, nobody may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def serve(options: MountOptions, build_tree: Callable[[], Tree]) -> None:
    """Mount the tree that ``build_tree`` returns.

    In the foreground: returns when the mount has ended. Otherwise: returns as soon as the mount answers, and a child
    process serves it; ``build_tree`` is called in that child, in this working directory and with this stderr, and the
    daemon's working directory is ``/`` from then on. The tree is closed when the mount ends.

    Raises MountError, with nothing left behind, when there can be no mount, and in the foreground whatever MergefsError
    ``build_tree`` raises; the daemon's is raised as a MergefsError with the same sentence and exit status. A signal
    during the preparation raises KeyboardInterrupt (SIGINT) or SystemExit (SIGTERM, SIGHUP).
    """
    mountpoint = resolve_mountpoint(options.mountpoint)
    binding = bindings.load_binding()
    check_mountpoint(mountpoint)
    check_device()
    if options.log_file is not None:
        # Absolute, because the daemon leaves this working directory before it opens the log once more.
        log_file = Path(os.path.realpath(options.log_file))
        options = dataclasses.replace(options, log_file=log_file)
        refuse_sources_inside(mountpoint, [log_file])
    server = _Server(options, mountpoint, binding, build_tree)
    if options.foreground:
        server.run_in_foreground()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        server.run_as_daemon(writing)
    os.close(writing)
    try:
        _wait_until_ready(child, reading, mountpoint)
    finally:
        os.close(reading)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Raise _StoppedError on the signals that end a server, where they are not ignored, and then put all back."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _StoppedError(number)

    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_like(stopped: _StoppedError) -> NoReturn:
    """Raise what a command that was ended by this signal raises."""
    if stopped.number == signal.SIGINT:
        raise KeyboardInterrupt from None
    raise SystemExit(128 + stopped.number) from None


# -- the process that the user started ------------------------------------------------------------------------------


def _wait_until_ready(child: int, reading: int, mountpoint: Path) -> None:
    """Return when the server ``child`` says that it is ready; otherwise raise, with nothing of it left."""
    try:
        with _signals_raise():
            outcome = listen(reading, child)
    except _StoppedError as stopped:
        _clear_away(child, mountpoint)
        _end_like(stopped)
    if outcome.ready:
        return
    if outcome.wait_status is None:
        _reap(child)
    _remove_remains(mountpoint)
    raise _failure(outcome, mountpoint)


def _failure(outcome: Outcome, mountpoint: Path) -> MergefsError:
    """Return the error to raise for a server that did not come up."""
    if outcome.error is not None:
        error = MergefsError(outcome.error)
        error.exit_status = outcome.exit_status
        return error
    code = os.waitstatus_to_exitcode(outcome.wait_status or 0)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    where = f"; its log is {outcome.log_file}" if outcome.log_file is not None else ""
    return MountError(f"the server for {mountpoint} {how} before the mount was ready{where}")


def _reap(child: int) -> bool:
    """Wait for ``child`` to end, at most for the deadline; return whether it has ended."""
    deadline = time.monotonic() + _STOPPING_DEADLINE
    # Blocked, the signal of a child that ends between the question and the wait is still there for the wait.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            signal.sigtimedwait({signal.SIGCHLD}, left)
    except ChildProcessError:
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return True


def _clear_away(child: int, mountpoint: Path) -> None:
    """End the server and take away what it may have mounted."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the impatient press Ctrl-C twice
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
        if not _reap(child):
            os.kill(child, signal.SIGKILL)
            _reap(child)
    _remove_remains(mountpoint)
    signal.signal(signal.SIGINT, previous)


def _remove_remains(mountpoint: Path) -> None:
    """Take away a mount that a dead server left: there was none before it started."""
    entry = find_mount(mountpoint)
    if entry is not None and entry.filesystem == FILESYSTEM:
        with contextlib.suppress(MountError):
            detach(entry, lazy=True)


# -- the process that serves ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Server:
    """The serving side: build the tree, mount it, serve it."""

    options: MountOptions
    mountpoint: Path
    binding: bindings.Binding
    build_tree: Callable[[], Tree]

    def run_in_foreground(self) -> None:
        """Serve in this process until the mount ends, with the log on stderr."""
        logs.remove_handlers()
        logs.set_levels(self.options.verbose)
        logs.add_stream()
        if self.options.log_file is not None:
            logs.add_file(self.options.log_file)
        self._serve(self._announce_in_foreground)

    def _announce_in_foreground(self) -> None:
        self._log_start()
        notify("READY=1")

    def _log_start(self) -> None:
        _log.info(
            "serving %s as process %d through %s and libfuse %d.%d",
            self.mountpoint,
            os.getpid(),
            self.binding.name,
            *self.binding.libfuse,
        )

    def _build(self) -> Tree:
        from mergefs.allocator import made_to_stay  # here, since what forks a server loads no engine

        try:
            with _signals_raise(), made_to_stay():
                return self.build_tree()
        except _StoppedError as stopped:
            _end_like(stopped)

    def _serve(self, on_ready: Callable[[], None]) -> None:
        tree = self._build()
        serve_tree(self.binding, tree, self.mountpoint, self.options.allow_other, on_ready, self.options.source)

    def run_as_daemon(self, writing: int) -> NoReturn:
        """Serve in this forked process; never returns."""
        status = 1
        try:
            status = self._run_as_daemon(writing)
        finally:
            logging.shutdown()
            # Not through the caller's frames, which are a copy of the parent's.
            os._exit(status)

    def _run_as_daemon(self, writing: int) -> int:
        os.setsid()
        _close_inherited(writing)
        speaker = Speaker(writing)
        log_file = self.options.log_file or logs.default_log_file(self.mountpoint.name)
        is_ours = self.options.log_file is None and not log_file.exists()
        logs.remove_handlers()
        logs.set_levels(self.options.verbose)
        logs.add_void()  # for a log file that cannot be written
        terminal = logs.add_terminal(logging.INFO if self.options.verbose else logging.WARNING)

        def announce() -> None:
            logs.remove_handler(terminal)
            _redirect_standard_streams(log_file)
            self._log_start()
            speaker.ready()

        try:
            logs.add_file(log_file)
            speaker.log_file(log_file)
            self._serve_from_root(announce)
        except MergefsError as error:
            sentence, status = str(error), error.exit_status
        except (KeyboardInterrupt, SystemExit):
            sentence, status = f"the server for {self.mountpoint} was stopped before the mount was ready", 1
        except BaseException as error:
            is_ours = False  # the log is needed
            if not self.options.verbose:
                logs.remove_handler(terminal)
            _log.critical("the server failed", exc_info=error)
            sentence, status = (
                f"internal error while mounting ({logs.summary(error)}); this is a bug, and {log_file} has the details",
                1,
            )
        else:
            return 0
        logs.remove_handler(terminal)  # the parent prints the sentence
        _log.error("%s", sentence)
        if is_ours and not speaker.is_done:
            log_file.unlink(missing_ok=True)
        speaker.failed(sentence, status)
        return status

    def _serve_from_root(self, announce: Callable[[], None]) -> None:
        tree = self._build()
        os.chdir("/")  # keep no other file system busy
        serve_tree(self.binding, tree, self.mountpoint, self.options.allow_other, announce, self.options.source)


def _close_inherited(keep: int) -> None:
    """Close descriptors that this process happens to have from its parent: a lock or a pipe would be held for days."""
    for link in list(Path("/proc/self/fd").iterdir()):
        descriptor = int(link.name)
        if descriptor > 2 and descriptor != keep:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _redirect_standard_streams(log_file: Path) -> None:
    """Point stdin at nothing and the others at the log, so that the caller's terminal and pipes are let go."""
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
