"""A file system for tests that shows another directory, with faults: errors, short reads, delays and flipped bits.

``faulty_files.py SOURCE MOUNTPOINT CONTROL`` serves until it is unmounted. CONTROL is a JSON file that is looked at
with every call: for a file's path relative to SOURCE, or for ``*``, which is all files that it does not name, it has

* ``fail_from`` and ``fail_to``: between these bytes reading is an error;
* ``times``: after so many errors of a file there are no more, until CONTROL is written anew;
* ``refused``: the errno of that error in the place of EIO, which opening the file gives, too;
* ``longest``: the bytes that one read gives at most;
* ``delay``: the seconds of each read;
* ``flip``: the bit that is flipped.

What ``stat`` says of a file never changes: no fault can be told from outside.
"""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mounting import environment, wait_for

from mergefs.mount.mountinfo import find_mount


@dataclass(frozen=True, slots=True)
class FaultyFiles:
    """A mounted directory of faulty files."""

    path: Path
    control: Path

    def set(self, file: str = "expert-1/model.safetensors", **faults: Any) -> None:
        """Let a file, by default the weights of the first expert, have these faults from here on, and no others."""
        new = self.control.with_suffix(".new")
        new.write_text(json.dumps({file: faults}))
        new.replace(self.control)


@contextmanager
def faulty_files(source: Path, mountpoint: Path) -> Iterator[FaultyFiles]:
    """Show ``source`` at ``mountpoint``, without faults at first."""
    mountpoint.mkdir()
    control = mountpoint.with_name("faults.json")
    control.write_text("{}")
    server = subprocess.Popen(
        [sys.executable, __file__, source, mountpoint, control], env=environment(mountpoint.parent)
    )
    try:
        wait_for(lambda: find_mount(mountpoint) is not None, "the faulty files")
        yield FaultyFiles(mountpoint, control)
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=True)
        assert server.wait(60) == 0


def serve(source: Path, mountpoint: Path, control: Path) -> None:
    """Serve until the mount is taken away."""
    from fuse import FUSE, FuseOSError, Operations

    class Files(Operations):  # type: ignore[misc]  # fusepy has no types
        """The operations of a read-only file system."""

        use_ns = True

        def __init__(self) -> None:
            self._control = control.stat()
            self._faults: dict[str, dict[str, Any]] = {}
            self._errors: Counter[str] = Counter()
            self._lock = threading.Lock()

        def faults(self, path: str) -> dict[str, Any]:
            """Return the faults that a file has now."""
            with self._lock:
                status = control.stat()
                if (status.st_ino, status.st_mtime_ns) != (self._control.st_ino, self._control.st_mtime_ns):
                    self._control, self._errors = status, Counter()
                    self._faults = json.loads(control.read_text())
                return self._faults.get(path[1:], self._faults.get("*", {}))

        def fail(self, path: str, faults: dict[str, Any]) -> None:
            """Raise an error, unless there have been enough of them."""
            with self._lock:
                if self._errors[path] >= faults.get("times", sys.maxsize):
                    return
                self._errors[path] += 1
            raise FuseOSError(faults.get("refused", errno.EIO))

        def open(self, path: str, flags: int) -> int:
            faults = self.faults(path)
            if "refused" in faults:
                self.fail(path, faults)
            return 0

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            try:
                status = os.lstat(f"{source}{path}")
            except OSError as error:
                raise FuseOSError(error.errno) from error
            names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")
            return {name: getattr(status, name) for name in names} | {"st_mtime": 10**18, "st_ctime": 10**18}

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *(entry.name for entry in Path(f"{source}{path}").iterdir())]

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            faults = self.faults(path)
            time.sleep(faults.get("delay", 0))
            if offset < faults.get("fail_to", 0) and offset + size > faults.get("fail_from", 0):
                self.fail(path, faults)
            with Path(f"{source}{path}").open("rb") as file:
                file.seek(offset)
                data = bytearray(file.read(min(size, faults.get("longest", size))))
            bit = faults.get("flip", -1)
            if offset * 8 <= bit < (offset + len(data)) * 8:
                data[bit // 8 - offset] ^= 1 << bit % 8
            return bytes(data)

    # Without the kernel's cache, so that every fault reaches who reads; inodes are those of the paths.
    FUSE(Files(), str(mountpoint), foreground=True, direct_io=True, ro=True, use_ino=False)


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:4]))
