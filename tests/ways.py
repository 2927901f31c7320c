"""Every way to read a whole merged model, in a process that strace watches from its start to its end."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mounting import environment, wait_for
from strace import Trace, command, read_trace, run

from mergefs.mount.mountinfo import find_mount


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read: a recipe under a budget, with the base that stands in where the recipe names none."""

    recipe: Path
    budget: str
    base: str | None
    catalog: Path
    state: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the command."""
        return environment(self.state, {"MERGEFS_CATALOG": str(self.catalog)})

    @property
    def options(self) -> list[str]:
        """The options of the command."""
        return ["--budget", self.budget, *(["--base", self.base] if self.base else [])]


def read_all(directory: Path) -> int:
    """Read every file below ``directory`` and return how many bytes there were."""
    total = 0
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                total += len(chunk)
    return total


@contextlib.contextmanager
def traced_mount(reading: Reading, directory: Path) -> Iterator[Path]:
    """Give a mount whose server runs under strace from its start to its end."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir(parents=True)
    arguments = [sys.executable, "-m", "mergefs.cli", "mount", "--foreground", *reading.options]
    arguments += [str(reading.recipe), str(mountpoint)]
    with (directory / "stderr").open("wb") as log:
        process = subprocess.Popen(
            command(directory / "trace", arguments),
            env=reading.environment,
            stdin=subprocess.DEVNULL,
            stderr=log,
        )

    def has_come() -> bool:
        assert process.poll() is None, (directory / "stderr").read_text()
        return find_mount(mountpoint) is not None and "serving" in (directory / "stderr").read_text()

    try:
        wait_for(has_come, "the mount")
        yield mountpoint
        subprocess.run(["umount", str(mountpoint)], check=True)
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            subprocess.run(["umount", "-l", str(mountpoint)], check=False)
            process.terminate()
            process.wait(timeout=60)


def trace_of_mount(reading: Reading, directory: Path) -> Trace:
    """Mount, and read every file of the mount."""
    with traced_mount(reading, directory) as mountpoint:
        read_all(mountpoint)
        status = json.loads(os.getxattr(mountpoint, "user.mergefs.status"))
        assert status["analysis_bytes_read"] == 0
        assert status["expert_bytes_reread"] == 0
        assert status["expert_bytes_read"] == status["expert_bytes_planned"]
    return read_trace(directory / "trace")


_READ_ALL_TENSORS: Final = """
import sys, mergefs
recipe, budget, base = sys.argv[1:]
with mergefs.open(recipe, budget=budget, base=base or None) as model:
    for name in model.keys():
        model.get_tensor(name)
    assert model.bytes_read["analysis_bytes_read"] == 0
"""


def trace_of_open(reading: Reading, directory: Path) -> Trace:
    """Open the merge in Python, and get every tensor."""
    arguments = [sys.executable, "-c", _READ_ALL_TENSORS, str(reading.recipe), reading.budget, reading.base or ""]
    return run(directory / "trace", arguments, reading.environment)


def trace_of_materialize(reading: Reading, directory: Path) -> Trace:
    """Write the merge to disk."""
    arguments = [sys.executable, "-m", "mergefs.cli", "materialize", *reading.options]
    arguments += [str(reading.recipe), str(directory / "out")]
    return run(directory / "trace", arguments, reading.environment)


WAYS: Final[dict[str, Callable[[Reading, Path], Trace]]] = {
    "mount": trace_of_mount,
    "open": trace_of_open,
    "materialize": trace_of_materialize,
}
