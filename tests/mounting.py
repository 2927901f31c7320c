"""Real mounts for tests: started by the real command, watched, taken away, and their logs read.

``mounted_recipes`` runs ``mergefs mount``; ``fake_mount`` runs the same daemon on the fake tree.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mergefs.mount.mountinfo import all_mounts, find_mount

ROOT: Final = Path(__file__).resolve().parent.parent
DEADLINE: Final = 60.0

_PR_SET_CHILD_SUBREAPER: Final = 36
_RECORD: Final = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) (\S+): (.*)")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = DEADLINE, pause: float = 0.005) -> None:
    """Return when ``condition()`` is true; AssertionError, which names ``what``, when the deadline passes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(pause)


def environment(state: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which mergefs is importable and keeps its logs, and its catalog, under ``state``."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    return (
        os.environ | {"PYTHONPATH": path, "XDG_STATE_HOME": str(state), "XDG_DATA_HOME": str(state)} | dict(extra or {})
    )


def run_mergefs(
    *arguments: str | Path, state: Path, cwd: Path | None = None, extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the real command line and return what it printed and its exit status."""
    adopt_orphans()
    return subprocess.run(
        [sys.executable, "-m", "mergefs.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=DEADLINE * 4,
        env=environment(state, extra),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def adopt_orphans() -> None:
    """Make daemons this process's children when their parent has gone, so that their exit status can be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def process_state(pid: int) -> str | None:
    """Return the letter that /proc has for what a process does, such as Z for a zombie; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields.rpartition(")")[2].split()[0]


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    return process_state(pid) not in (None, "Z")


def split_records(log: str) -> list[str]:
    """Return the records of a server's log, each with the traceback that follows it."""
    return re.split(rf"^(?={_RECORD.pattern}$)", log, flags=re.MULTILINE)


def unexpected_records(log: str, allowed: Sequence[str] = ()) -> list[str]:
    """Return every warning, error and traceback of a server's log that matches none of the ``allowed`` patterns."""
    unexpected = []
    was_allowed = False
    for line in log.splitlines():
        record = _RECORD.fullmatch(line)
        if record is None:
            if not was_allowed:
                unexpected.append(line)  # a traceback, or what some library printed
            continue
        was_allowed = any(re.search(pattern, line) for pattern in allowed)
        if record[1] not in ("DEBUG", "INFO") and not was_allowed:
            unexpected.append(line)
    return unexpected


def clear_mounts_below(directory: Path) -> list[Path]:
    """Detach every mount below ``directory``, the last one first, and return their mount points."""
    found = [entry.mountpoint for entry in all_mounts() if entry.mountpoint.is_relative_to(directory)]
    for mountpoint in reversed(found):
        command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount", "-u", "-z"]
        subprocess.run([*command, str(mountpoint)], check=True)
    return found


@dataclass
class Mount:
    """A mount in a process of its own.

    ``allowed`` are patterns of log records that the test provokes; it may add to them.
    """

    mountpoint: Path
    pid: int
    log_file: Path
    control: Path
    allowed: list[str] = field(default_factory=list)
    exit_status: int | None = None

    def log(self) -> str:
        """Return the server's log so far."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def kill(self, number: int) -> None:
        """Send a signal to the server."""
        os.kill(self.pid, number)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the server do nothing meanwhile."""
        self.kill(signal.SIGSTOP)
        try:
            wait_for(lambda: process_state(self.pid) == "T", "the server to stop")
            yield
        finally:
            self.kill(signal.SIGCONT)

    def wait(self) -> int:
        """Wait for the server's end, and return its exit status (negative: the signal that killed it)."""
        if self.exit_status is None:

            def has_ended() -> bool:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.exit_status = os.waitstatus_to_exitcode(status)
                return pid != 0

            wait_for(has_ended, f"the end of the server {self.pid}")
        assert self.exit_status is not None
        return self.exit_status

    def unmount(self) -> None:
        """Take the mount away as the kernel's own tools do, when it is still there."""
        if find_mount(self.mountpoint) is not None:
            command = ["umount"] if os.geteuid() == 0 else ["fusermount", "-u"]
            subprocess.run([*command, str(self.mountpoint)], check=True, capture_output=True)


@contextlib.contextmanager
def _watched(mount: Mount) -> Iterator[Mount]:
    """Give the mount to the test; then unmount, and check that the server ended well and logged nothing unexpected."""
    try:
        yield mount
        mount.unmount()
        assert mount.wait() == 0, mount.log()
        assert find_mount(mount.mountpoint) is None
        assert unexpected_records(mount.log(), mount.allowed) == []
    finally:
        if mount.exit_status is None:
            clear_mounts_below(mount.mountpoint)
            with contextlib.suppress(ProcessLookupError):
                mount.kill(signal.SIGKILL)
            mount.wait()
        clear_mounts_below(mount.mountpoint)


def start_fake_server(
    directory: Path, *arguments: str | Path, extra: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Start the fake server on ``directory/mnt``, with ``directory/control`` to steer it."""
    adopt_orphans()
    control = directory / "control"
    control.mkdir(exist_ok=True)
    if find_mount(directory / "mnt") is None:  # of a crashed one, nothing could be asked
        (directory / "mnt").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "fake_server.py", control, directory / "mnt", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=environment(directory / "state", extra),
    )


def server_pid(directory: Path) -> int:
    """Return the process that built the fake tree of ``directory``, and serves it."""
    return int((directory / "control" / "building").read_text())


def run_fake(directory: Path, *arguments: str | Path, extra: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Run the fake server's starter to its end; return its exit status and the lines that it printed."""
    starter = start_fake_server(directory, *arguments, extra=extra)
    said = starter.communicate(timeout=DEADLINE)[1].decode().splitlines()
    return starter.returncode, said


@contextlib.contextmanager
def fake_mount(directory: Path, *arguments: str | Path, extra: Mapping[str, str] | None = None) -> Iterator[Mount]:
    """Mount the fake tree as a daemon; ``mergefs mount`` has returned when the test gets the mount."""
    log_file = directory / "server.log"
    starter = start_fake_server(directory, "--log-file", log_file, *arguments, extra=extra)
    said = starter.communicate(timeout=DEADLINE)[1].decode()
    assert starter.returncode == 0, said
    with _watched(Mount(directory / "mnt", server_pid(directory), log_file, directory / "control")) as mount:
        yield mount


@contextlib.contextmanager
def foreground_mount(
    directory: Path, *arguments: str | Path, extra: Mapping[str, str] | None = None
) -> Iterator[Mount]:
    """Mount the fake tree with ``--foreground``; its log is what it writes to stderr."""
    log_file = directory / "server.log"
    with log_file.open("wb") as log:
        starter = start_fake_server(directory, "--foreground", *arguments, extra=extra, stderr=log.fileno())
    mount = Mount(directory / "mnt", starter.pid, log_file, directory / "control")

    def has_come() -> bool:
        assert is_running(starter.pid), mount.log()
        return find_mount(mount.mountpoint) is not None and "serving" in mount.log()

    wait_for(has_come, "the mount")
    with _watched(mount):
        yield mount
    starter.returncode = mount.exit_status  # this process has been waited for


@contextlib.contextmanager
def mounted_recipes(
    *recipes: Path,
    mountpoint: Path,
    state: Path,
    options: Sequence[str] = (),
    allowed: Sequence[str] = (),
    cwd: Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> Iterator[Mount]:
    """Run ``mergefs mount RECIPE... MOUNTPOINT`` and give the mount to the test.

    ``options`` stand after ``mount``; ``allowed`` are patterns of log records that are no failure; logs go below
    ``state``. Fails, with what the command printed, when there is no mount.
    """
    state.mkdir(parents=True, exist_ok=True)
    mountpoint.mkdir(parents=True, exist_ok=True)
    log_file = state / f"{mountpoint.name}.log"
    result = run_mergefs(
        "--log-file", log_file, "mount", *options, *recipes, mountpoint, state=state, cwd=cwd, extra=extra
    )
    assert result.returncode == 0, result.stderr
    served = re.search(r"as process (\d+)", log_file.read_text())
    assert served is not None
    with _watched(Mount(mountpoint, int(served[1]), log_file, state, list(allowed))) as mount:
        yield mount


def reader(path: Path) -> "subprocess.Popen[bytes]":
    """Start a process that reads one MiB of ``path`` and says whether that went well."""
    code = (
        "import os, sys\n"
        "descriptor = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)\n"
        "try: sys.stdout.buffer.write(os.pread(descriptor, 1 << 16, 4096))\n"
        "except OSError as error: print('failed with', error.errno)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)


def holder(path: Path) -> "subprocess.Popen[bytes]":
    """Start a process that holds ``path`` open until its stdin is closed."""
    code = "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    return process
