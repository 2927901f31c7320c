"""Commands as a user who is nobody, on a machine where everybody may use FUSE.

Root makes such a machine out of this one, for the processes that it starts there alone: in a mount namespace where
``/dev/fuse`` and ``/etc/fuse.conf`` are as distributions have them for people who sit before their machines. Where the
tests are run by an ordinary user, that one and the machine are taken as they are.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from mounting import DEADLINE, adopt_orphans, environment, is_running, wait_for

ROOT: Final = os.geteuid() == 0
_NOBODY: Final = 65534
_FUSE_CONF: Final = Path("/etc/fuse.conf")
FORGET_MOUNTS: Final = "umount --all --lazy --types fuse.mergefs || true"
"""A mount namespace begins with all mounts that there are, and would keep their servers from ending."""

_MAKE_MACHINE: Final = f"""
    {FORGET_MOUNTS}
    mount -t tmpfs -o mode=755 none "$1"
    mknod -m 666 "$1/fuse" c "$2" "$3"
    mount --bind "$1/fuse" /dev/fuse
    printf '%s\\n' "$4" > "$1/fuse.conf"
    mount --bind "$1/fuse.conf" /etc/fuse.conf
    echo ready
    exec cat
"""

# The repository and its Python may lie in root's home. To read and search everywhere is all that this user may do
# beyond what others may; mounting is not part of it.
_BECOME_NOBODY: Final = (
    "setpriv",
    f"--reuid={_NOBODY}",
    f"--regid={_NOBODY}",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine, and a directory of the user's own. ``namespace`` is the process that has it, None for this one."""

    home: Path
    namespace: int | None

    @property
    def environment(self) -> dict[str, str]:
        places = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MERGEFS_CATALOG", "TMPDIR")
        return environment(self.home / "state", {name: str(self.home / name.lower()) for name in places})

    def words(self, command: tuple[str | Path, ...], as_root: bool) -> list[str]:
        """Return what to execute in order to run ``command`` there."""
        enter = [] if self.namespace is None else ["nsenter", f"--mount=/proc/{self.namespace}/ns/mnt", "--"]
        become = _BECOME_NOBODY if ROOT and not as_root else ()
        return [*enter, *become, *map(str, command)]

    def run(self, *command: str | Path, as_root: bool = False) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end, as the user or as root."""
        adopt_orphans()
        return subprocess.run(
            self.words(command, as_root),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE * 2,
            check=False,
        )

    def mergefs(self, *arguments: str | Path, as_root: bool = False) -> "subprocess.CompletedProcess[str]":
        """Run the real command line."""
        return self.run(sys.executable, "-m", "mergefs.cli", *arguments, as_root=as_root)

    @contextlib.contextmanager
    def running(self, *command: str | Path, stderr: int | IO[Any] | None = None) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a command beside the test until its stdin is closed."""
        with subprocess.Popen(
            self.words(command, False),
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        ) as process:
            yield process


def end_of(pid: int) -> int:
    """Wait for the end of a daemon that this process has adopted, and return its exit status."""
    wait_for(lambda: not is_running(pid), f"the end of the server {pid}")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def machine(configuration: str = "") -> Iterator[Machine]:
    """Lend a machine with ``configuration`` in its /etc/fuse.conf, and check that nothing is left of it."""
    with tempfile.TemporaryDirectory(prefix="mergefs-user-") as place:
        home, system = Path(place) / "user", Path(place) / "system"
        for directory in (home, system):
            directory.mkdir()
        Path(place).chmod(0o755)
        for name in ("mnt", "home", "tmpdir"):
            (home / name).mkdir()
        if not ROOT:
            yield Machine(home, None)
            return
        for path in (home, *home.iterdir()):
            os.chown(path, _NOBODY, _NOBODY)
        device = os.stat("/dev/fuse").st_rdev  # noqa: PTH116 (of the device, and no other path is meant)
        numbers = (str(os.major(device)), str(os.minor(device)))
        script = ("sh", "-euc", _MAKE_MACHINE, "sh", str(system), *numbers, configuration)
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as namespace:
            try:
                assert namespace.stdout is not None
                assert namespace.stdout.readline() == b"ready\n"
                yield Machine(home, namespace.pid)
            finally:
                left = Path(f"/proc/{namespace.pid}/mounts").read_text()
                namespace.send_signal(signal.SIGTERM)
        assert str(home) not in left, left
