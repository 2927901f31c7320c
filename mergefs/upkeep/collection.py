"""Removes what nothing needs: records, files of planes, unfinished work of dead processes, copies of damaged data."""

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.directory import COMPACTING, DAMAGED_DATA, PLANES, SALVAGE
from mergefs.catalog.records import TransactionRecord
from mergefs.errors import MaterializeError
from mergefs.materialize.staging import lock_path, locked, staging_path
from mergefs.materialize.transaction import abandon, settle
from mergefs.upkeep.garbage import Garbage, Needs, find_garbage

_OPEN: Final = ("begun", "prepared")
_DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed of one kind (a table, or files): how many, and the bytes that they took."""

    kind: str
    count: int
    size: int


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection has removed, or would; ``kept`` are sentences about what could not be removed, and why.

    ``before`` and ``after`` are the bytes on disk by kind: tables, free pages, and files.
    """

    removed: tuple[Removed, ...]
    kept: tuple[str, ...]
    before: dict[str, int]
    after: dict[str, int]


def collect(catalog: Catalog, needs: Needs, dry_run: bool = False, compact: bool = False) -> Collected:
    """Remove what nothing needs, or with ``dry_run`` only say what that is.

    Records that somebody writes meanwhile stay. Files in the catalog's directory are removed, and the data compacted,
    only while no other process has the catalog open. Raises CatalogError.
    """
    before = catalog.space()
    removed: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    notes: list[str] = []
    for kind, size in _end_interrupted(catalog, needs, dry_run, notes):
        removed[kind] += 1
        sizes[kind] += size
    garbage, careful = find_garbage(catalog, needs)
    notes += careful
    if not dry_run:
        catalog.remove([(one.table, one.kept) for one in garbage])
    for one in garbage:
        removed[one.table] += 1
        sizes[one.table] += one.size
    with catalog.alone() as alone:
        for kind, path in _files(catalog, garbage):
            if not alone and not dry_run:
                notes.append(f"{path} is kept, since {catalog.other_users()} has the catalog open")
                continue
            removed[kind] += 1
            sizes[kind] += _allocated(path)
            if not dry_run:
                _delete(path)
        if compact and not dry_run and not alone:
            notes.append(f"the data is not compacted, since {catalog.other_users()} has the catalog open")
        elif compact and not dry_run:
            catalog.compact()
    rows = tuple(Removed(kind, removed[kind], sizes[kind]) for kind in removed)
    return Collected(rows, tuple(notes), before, before if dry_run else catalog.space())


# -- unfinished work --------------------------------------------------------------------------------------------------


def _end_interrupted(catalog: Catalog, needs: Needs, dry_run: bool, notes: list[str]) -> Iterator[tuple[str, int]]:
    """Bring runs to an end whose process is dead; yield the staging directories that this removes, with their size.

    Work that can be gone on with is kept until it is old enough.
    """
    latest: dict[str, TransactionRecord] = {}
    for record in catalog.transactions():
        if record.state in _OPEN:
            latest[record.destination] = max(latest.get(record.destination, record), record, key=_changed)
    for name, record in latest.items():
        destination = Path(name)
        if _is_at_work(destination):
            continue
        staged = staging_path(destination)
        size = _allocated(staged)
        if dry_run:
            if size and needs.is_old(_changed(record) // (_DAY * 10**9)):
                yield "staging", size
            continue
        try:
            _end(catalog, destination, needs.is_old(_changed(record) // (_DAY * 10**9)))
        except (MaterializeError, OSError) as error:
            notes.append(f"unfinished work is kept: {error}")
        if size and not staged.exists():
            yield "staging", size


def _end(catalog: Catalog, destination: Path, give_up: bool) -> None:
    with locked(destination) as stage:
        journal = settle(catalog, stage)
        if journal is not None and give_up:
            abandon(catalog, stage, journal)


def _changed(record: TransactionRecord) -> int:
    return record.changed_ns


def _is_at_work(destination: Path) -> bool:
    """Return whether a process holds the lock of a destination."""
    try:
        descriptor = os.open(lock_path(destination), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


# -- files ------------------------------------------------------------------------------------------------------------


def _files(catalog: Catalog, garbage: Sequence[Garbage]) -> Iterator[tuple[str, Path]]:
    """Yield the files in the catalog's directory that nothing needs once ``garbage`` is removed."""
    removed = {one.kept.key for one in garbage if one.table == "planes"}
    needed = {kept.record.file for kept in catalog.kept("planes") if kept.key not in removed}
    with suppress(FileNotFoundError):
        for path in sorted((catalog.path / PLANES).iterdir()):
            if path.name not in needed:
                yield "plane files", path
    for name in (COMPACTING, SALVAGE, DAMAGED_DATA):
        if (catalog.path / name).exists():
            yield "leftovers", catalog.path / name


def _allocated(path: Path) -> int:
    """Return the bytes that a file, or all in a directory, takes on the disk."""
    paths = (path, *path.rglob("*")) if path.is_dir() else (path,)
    total = 0
    for one in paths:
        with suppress(OSError):
            status = one.lstat()
            total += status.st_blocks * 512 if not one.is_dir() else 0
    return total


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
