"""What a benchmark ran on, for people to read beside its figures."""

import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Final

from bench.processes import ROOT
from mergefs.units import format_size

_PACKAGES: Final = ("numpy", "numba", "torch", "safetensors", "mergekit")


def described(work: Path) -> dict[str, str]:
    """Return what the machine is: processor, memory, disk of ``work``, system and versions."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": format_size(pages * page),
        "disk": _disk(work),
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        "mergefs": _commit(),
    }


def about(work: Path) -> str:
    """Return what measurements must have in common: the code of mergefs, the machine, what it has installed."""
    hasher = hashlib.sha256(f"{_processor()} {_disk(work)} {[version(name) for name in _PACKAGES]}".encode())
    for path in sorted((ROOT / "mergefs").rglob("*.py")):
        hasher.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()[:16]


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _disk(work: Path) -> str:
    """Return the device and the file system that a directory is on."""
    work.mkdir(parents=True, exist_ok=True)
    command = ["df", "--output=source,fstype,size", "-h", work]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1]
    source, kind, size = shown.split()
    return f"{source}, {kind}, {size}"


def _commit() -> str:
    """Return the commit that is measured, and whether the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False).stdout

    commit = git("rev-parse", "--short", "HEAD").strip() or version("mergefs")
    return f"{commit} with changes" if git("status", "--porcelain", "mergefs").strip() else commit
