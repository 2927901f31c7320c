"""What the process that a user started hears from the server it forked: JSON lines through a pipe."""

import contextlib
import json
import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_POLL_MILLISECONDS: Final = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the start of a server ended.

    ``error`` is the sentence for people, None when the mount is ready. ``wait_status`` is the server's, as
    ``os.waitpid`` gives it, where it ended without having said either.
    """

    ready: bool
    error: str | None
    exit_status: int
    log_file: Path | None
    wait_status: int | None


class Speaker:
    """The server's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def is_done(self) -> bool:
        """Whether ``ready`` has been said."""
        return self._descriptor == -1

    def log_file(self, path: Path) -> None:
        """Say where the log is, for the case that nothing else is ever said."""
        self._send({"log_file": str(path)})

    def ready(self) -> None:
        """Say that the mount answers; the last word. BrokenPipeError when nobody listens any more."""
        self._send({"ready": True})
        os.close(self._descriptor)
        self._descriptor = -1  # its number may belong to another file from now on

    def failed(self, sentence: str, exit_status: int) -> None:
        """Say why there is no mount; the last word, heard or not. Nothing when ``ready`` was said before."""
        with contextlib.suppress(OSError):
            if not self.is_done:
                self._send({"error": sentence, "exit_status": exit_status})

    def _send(self, message: dict[str, object]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]


def listen(descriptor: int, child: int) -> Outcome:
    """Wait for the last word of the server ``child``, or for its death."""
    received = b""
    wait_status: int | None = None
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        # The end of the pipe alone proves nothing: a process that the server started may hold it open.
        if poll.poll(0 if wait_status is not None else _POLL_MILLISECONDS):
            data = os.read(descriptor, 65536)
            received += data
            outcome = _parse(received, wait_status)
            if outcome.ready or outcome.error is not None:
                return outcome
            if data:
                continue
            if wait_status is None:
                wait_status = os.waitpid(child, 0)[1]
        if wait_status is not None:
            return _parse(received, wait_status)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            wait_status = status  # and once more around, for what it may have said just before


def _parse(received: bytes, wait_status: int | None) -> Outcome:
    """Return what the complete lines of ``received`` say."""
    message: dict[str, object] = {}
    for line in received.split(b"\n")[:-1]:
        message |= json.loads(line)
    log_file, error = message.get("log_file"), message.get("error")
    return Outcome(
        ready=bool(message.get("ready")),
        error=None if error is None else str(error),
        exit_status=int(str(message.get("exit_status", 1))),
        log_file=None if log_file is None else Path(str(log_file)),
        wait_status=wait_status,
    )
