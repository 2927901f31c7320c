"""One mount from the call of libfuse to its end, within the process that serves it."""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from mergefs.errors import MountError
from mergefs.mount import bindings, kernel_window
from mergefs.mount.adapter import TreeOperations
from mergefs.mount.mountinfo import FILESYSTEM, find_mount
from mergefs.mount.tree import Tree

_log = logging.getLogger("mergefs.mount")

_STDERR: Final = 2
_VISIBLE_DEADLINE: Final = 10.0


class _StderrCapture:
    """Keeps what C code writes to descriptor 2: libfuse says there, and only there, why a mount failed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._saved: int | None = None
        self._file = -1

    def __enter__(self) -> "_StderrCapture":
        sys.stderr.flush()
        self._file = os.memfd_create("mergefs-stderr", os.MFD_CLOEXEC)
        self._saved = os.dup(_STDERR)
        os.dup2(self._file, _STDERR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        os.close(self._file)

    def stop(self) -> None:
        """Give stderr back; callable more than once and from any thread."""
        with self._lock:
            if self._saved is not None:
                os.dup2(self._saved, _STDERR)
                os.close(self._saved)
                self._saved = None

    def lines(self) -> list[str]:
        """Return the lines that were written meanwhile."""
        size = os.fstat(self._file).st_size
        text = os.pread(self._file, size, 0).decode(errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]


class _Announcer(threading.Thread):
    """Waits until the mount answers and then calls ``on_ready``; ends the session when that is not to be."""

    def __init__(self, mountpoint: Path, capture: _StderrCapture, on_ready: Callable[[], None]) -> None:
        super().__init__(name="announcer", daemon=True)
        self.initialised = threading.Event()
        self.failure: MountError | None = None
        self._over = threading.Event()
        self._mountpoint = mountpoint
        self._capture = capture
        self._on_ready = on_ready

    def run(self) -> None:
        """Wait for the mount, announce it, or record why that could not be done."""
        self.initialised.wait()
        if self._over.is_set():
            return
        self._capture.stop()
        for line in self._capture.lines():
            _log.info("libfuse: %s", line)  # it has mounted, whatever it remarked
        try:
            self._wait_until_visible()
            if not self._over.is_set():
                self._on_ready()
        except BrokenPipeError:
            self._fail(f"nobody waits any more for the mount on {self._mountpoint}; it is taken away again")
        except MountError as error:
            self._fail(str(error))
        except Exception as error:
            _log.exception("cannot announce the mount")
            self._fail(f"the mount on {self._mountpoint} could not be announced: {error}")

    def _fail(self, sentence: str) -> None:
        """Record the failure and end the session as a signal from outside would."""
        self.failure = MountError(sentence)
        os.kill(os.getpid(), signal.SIGTERM)

    def _wait_until_visible(self) -> None:
        """Return when the mount is in the kernel's list and its root answers; MountError when it does not come."""
        deadline = time.monotonic() + _VISIBLE_DEADLINE
        while not self._over.is_set():
            entry = find_mount(self._mountpoint)
            if entry is not None and entry.filesystem == FILESYSTEM:
                break
            if time.monotonic() > deadline:
                raise MountError(f"{self._mountpoint} was mounted but is not among this system's mounts")
            self._over.wait(0.002)
        else:
            return
        try:
            self._mountpoint.stat()
        except OSError as error:
            if not self._over.is_set():
                raise MountError(f"the mount on {self._mountpoint} does not answer: {error.strerror}") from error
            return
        kernel_window.widen(entry.device)  # not before it has answered: the kernel sets its own as that begins

    def finish(self) -> None:
        """Say that the session is over, and wait for the thread."""
        self._over.set()
        self.initialised.set()
        self.join()


def serve_tree(
    binding: bindings.Binding,
    tree: Tree,
    mountpoint: Path,
    allow_other: bool,
    on_ready: Callable[[], None],
    source: str = bindings.SOURCE,
) -> None:
    """Show ``tree`` on ``mountpoint`` until it is unmounted or SIGINT, SIGTERM or SIGHUP ends it; then close the tree.

    Must be called in the main thread. The list of mounts names ``source`` as what is mounted. ``on_ready`` is called
    from another thread once the mount answers; raising BrokenPipeError there ends the session. SIGUSR1 writes the
    stacks of all threads to stderr. Raises MountError with libfuse's own words when the mount fails.
    """
    try:
        _serve(binding, tree, mountpoint, allow_other, on_ready, source)
    finally:
        tree.close()


def _serve(
    binding: bindings.Binding,
    tree: Tree,
    mountpoint: Path,
    allow_other: bool,
    on_ready: Callable[[], None],
    source: str,
) -> None:
    faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True)
    # libfuse takes these over, to end its loop and unmount, but only where nobody else handles or ignores them.
    # nohup's ignored SIGHUP stays ignored.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    with _StderrCapture() as capture:
        announcer = _Announcer(mountpoint, capture, on_ready)
        operations = TreeOperations(tree, mountpoint, announcer.initialised.set)
        announcer.start()
        try:
            bindings.run(binding, operations, mountpoint, allow_other, source)
        except MountError as error:
            capture.stop()
            if operations.initialised:
                raise
            raise MountError(_explain(mountpoint, capture.lines(), str(error))) from error
        finally:
            announcer.finish()
    if announcer.failure is not None:
        raise announcer.failure
    _log.info("unmounted %s", mountpoint)


def _explain(mountpoint: Path, lines: list[str], otherwise: str) -> str:
    """Return one sentence about a failed mount from what libfuse and fusermount printed."""
    said = "; ".join(line.removeprefix("fuse: ") for line in lines) or otherwise
    text = f"cannot mount on {mountpoint}: {said}"
    if "failed to exec fusermount" in said:
        return f"{text}; install it with `apt-get install fuse3` or `dnf install fuse`"
    if "not permitted" in said or "denied" in said.lower():
        return (
            f"{text}; in a container add `--device /dev/fuse --cap-add SYS_ADMIN`, and with AppArmor "
            f"`--security-opt apparmor=unconfined`; {bindings.WITHOUT_FUSE}"
        )
    return text
