"""Runs the check in a process of its own, so that pages which kill LMDB become a sentence like any other."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from mergefs.catalog.check.evidence import REMEDIES, Finding, Repair, Report
from mergefs.catalog.directory import DAMAGED_DATA, DATA, READERS, SALVAGE, Users, sync_directory
from mergefs.errors import CatalogError

REFUSED: Final = 3
DAMAGED: Final = 4


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a process ended: its exit status (negative: the signal that killed it), and what it wrote."""

    status: int
    output: bytes
    last_words: str


def check_catalog(path: Path, repair: bool = False, forget: bool = False) -> Report:
    """Return everything that is not as it must be in the catalog at ``path``, and repair what can be repaired.

    Raises CatalogError when the catalog cannot be opened for a reason that is not in its data.
    """
    if not (path / DATA).exists():
        return Report(str(path), {}, ())
    report = _run(path, repair, forget)
    broken = [finding for finding in report.findings if finding.repair is Repair.REBUILD]
    if not repair or not broken:
        return report
    _rebuild(path)
    again = _run(path, repair, forget)
    return Report(again.path, again.records, again.findings, (*report.repaired, *broken, *again.repaired))


def _run(path: Path, repair: bool, forget: bool) -> Report:
    """Check once."""
    ended = _process(path, [*(["--repair"] if repair else []), *(["--forget"] if forget else [])])
    if ended.status == 0:
        return msgspec.msgpack.decode(ended.output, type=Report)
    if ended.status == REFUSED:
        raise CatalogError(ended.last_words)
    if ended.status == DAMAGED:
        says = ended.last_words.removeprefix(f"{path}: ").partition("; ")[0]
    elif ended.status < 0:
        says = f"its pages are damaged: reading them ended LMDB by {signal.Signals(-ended.status).name}"
    else:
        raise RuntimeError(f"the check of {path} ended with status {ended.status}: {ended.last_words}")
    finding = Finding("C3", "", "", str(path / DATA), says, REMEDIES[Repair.REBUILD], Repair.REBUILD)
    return Report(str(path), {}, (finding,))


def _rebuild(path: Path) -> None:
    """Put a new file with the records that can be read in the place of the damaged one, which is kept beside it."""
    users = Users(path)
    try:
        if not users.try_alone():
            raise CatalogError(
                f"{path}: the file is damaged, and {users.names()} has it open, so it cannot be replaced; end that "
                "process and run `mergefs catalog check --repair` again"
            )
        shutil.rmtree(path / SALVAGE, ignore_errors=True)
        _process(path, ["--salvage"])  # killed or not: what it could read is in the new file
        (path / DATA).replace(path / DAMAGED_DATA)
        if (path / SALVAGE / DATA).exists():
            (path / SALVAGE / DATA).replace(path / DATA)
        (path / READERS).unlink(missing_ok=True)
        sync_directory(path)
        shutil.rmtree(path / SALVAGE, ignore_errors=True)
    finally:
        users.close()


def _process(path: Path, options: Sequence[str]) -> _Ended:
    """Run ``python -m mergefs.catalog.check`` and wait for it."""
    finished = subprocess.run(
        [sys.executable, "-m", "mergefs.catalog.check", str(path), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)},  # noqa: PTH100
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    words = finished.stderr.decode(errors="replace").strip().splitlines()
    return _Ended(finished.returncode, finished.stdout, words[-1] if words else "")
