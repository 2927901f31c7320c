"""Runs commands and says what they took: seconds on the clock and of processors, and the most memory."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

ROOT: Final = Path(__file__).resolve().parent.parent.parent
_LAUNCHER: Final = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run took; ``peak_bytes`` is the largest resident set of its processes, ``facts`` what else is told."""

    seconds: float
    processor_seconds: float = 0.0
    peak_bytes: int = 0
    facts: Mapping[str, float] = field(default_factory=dict)
    output: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command runs within: these processors (none named: all), and these groups of the kernel's, by file."""

    processors: tuple[int, ...] = ()
    groups: tuple[Path, ...] = ()


FREE: Final = Limits()


def measured(command: Sequence[str | Path], variables: Mapping[str, str], limits: Limits = FREE) -> Taken:
    """Run a command, which must succeed, and return what it took and printed."""
    with tempfile.TemporaryDirectory(prefix="mergefs-bench-") as directory:
        report = Path(directory) / "report.json"
        asked = {
            "command": list(map(str, command)),
            "report": str(report),
            "processors": limits.processors,
            "groups": list(map(str, limits.groups)),
        }
        done = subprocess.run(
            [sys.executable, "-I", "-S", _LAUNCHER, json.dumps(asked)],
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-20:])
            raise click.ClickException(f"{' '.join(map(str, command))} ended with {done.returncode}: {said}")
        return Taken(**json.loads(report.read_text()), output=done.stdout)


def told(command: Sequence[str | Path], variables: Mapping[str, str], limits: Limits = FREE) -> Taken:
    """Run a command that prints its own seconds, without its start, and the bytes that it has been through."""
    taken = measured(command, variables, limits)
    said = json.loads(taken.output)
    return Taken(said["seconds"], taken.processor_seconds, taken.peak_bytes, {"bytes": said["bytes"]})


def timed(arguments: Sequence[str | Path], variables: Mapping[str, str]) -> float:
    """Run a command, which must succeed, and return how many seconds it took."""
    started = time.perf_counter()
    result = subprocess.run(
        list(map(str, arguments)),
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    elapsed = time.perf_counter() - started
    if result.returncode != 0:
        raise click.ClickException(f"{' '.join(map(str, arguments))}: {result.stderr.strip()}")
    return elapsed


def environment(directory: Path) -> dict[str, str]:
    """Return an environment without a network, where mergefs is importable and keeps everything below ``directory``."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Programs are measured as they are when they are installed, and then their byte code lies beside them. Where Python
    # is told not to keep it, a checkout would be compiled at every start, and its peers in site-packages would not.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {
        "PYTHONPATH": path,
        "MERGEFS_CATALOG": str(directory / "catalog"),
        "XDG_STATE_HOME": str(directory / "state"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


@contextmanager
def scratch(where: Path | None) -> Iterator[Path]:
    """Lend a directory that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="mergefs-bench-", dir=where))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
