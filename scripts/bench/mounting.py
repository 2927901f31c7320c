"""Mounts a recipe for a measurement, and reads what is shown."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.processes import Taken, timed, told
from bench.programs import MERGEFS, SAME_OPTIONS
from bench.setting import Setting

_READER: Final = Path(__file__).with_name("reading.py")


@contextmanager
def mounted(setting: Setting, recipe: Path, mountpoint: Path, catalog: Path) -> Iterator["Mount"]:
    """Mount a recipe as long as the context lasts."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    variables = setting.variables(catalog)
    timed([*MERGEFS, "mount", recipe, mountpoint, *SAME_OPTIONS], variables)
    try:
        yield Mount(mountpoint, variables)
    finally:
        timed([*MERGEFS, "umount", mountpoint], variables)


class Mount:
    """A mount that answers, and its server."""

    def __init__(self, mountpoint: Path, variables: dict[str, str]) -> None:
        self.mountpoint = mountpoint
        command = [*MERGEFS, "status", mountpoint, "--json"]
        printed = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
        self.process = int(json.loads(printed)[0]["pid"])

    def peak_bytes(self) -> int:
        """Return the most memory that the server has had resident."""
        status = Path(f"/proc/{self.process}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def read(setting: Setting, pattern: str, place: Path, catalog: Path | None = None) -> Taken:
    """Read a directory in a pattern; the seconds are those of reading alone, without the start of the reader."""
    return told([sys.executable, _READER, pattern, place], setting.variables(catalog))
