"""``mergefs materialize``: one merged model, written as one transaction."""

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergefs import __version__
from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import TransactionRecord
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.readings import keep_reading
from mergefs.engine.resources import Resources
from mergefs.errors import MaterializeError
from mergefs.materialize.manifest import MANIFEST_NAME, Manifest
from mergefs.materialize.staging import Staging, staging
from mergefs.materialize.writer import write_file, write_files
from mergefs.planner.plan import MergePlan
from mergefs.progress import Progress, Silence
from mergefs.sources.ledger import LedgerTotals
from mergefs.units import format_size

_MARGIN = 16 * 2**20
"""Room for directory entries and the manifest, beside the files themselves."""


@dataclass(frozen=True, slots=True)
class Materialized:
    """What was written, and what it cost."""

    directory: Path
    plan_id: str
    files: int
    bytes_written: int
    totals: LedgerTotals
    seconds: float


def materialize(
    plan: MergePlan, destination: Path, resources: Resources, overwrite: bool = False, progress: Progress | None = None
) -> Materialized:
    """Write the model of ``plan`` to ``destination``, which appears complete or not at all.

    Raises MaterializeError when the destination is in the way or the disk fails, NonFiniteError and SourceChangedError
    for what the sources do; the destination is then as it was.
    """
    started = time.monotonic()
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 (Path.absolute keeps "..")
    _check_destination(
        destination,
        overwrite,
        [source.path for source in plan.sources],
        (Path(plan.recipe.origin), resources.catalog.path),
    )
    files = ModelFiles(plan, resources, strict=True)
    total = sum(files.sizes.values())
    for name in files.sizes:
        files.check(name)
    before = resources.ledger.totals()
    with staging(destination) as stage:
        _check_space(destination, total)
        transaction = _Transaction(resources.catalog, plan, stage)
        try:
            (progress or Silence()).start("writing", total)
            entries = write_files(files, stage.path, progress or Silence())
            totals = resources.ledger.totals()
            read = totals.expert_bytes_read - before.expert_bytes_read
            manifest = Manifest.create(
                plan.plan_id, entries, plan.outcome.expert_bytes_planned, read, __version__
            ).encode()
            write_file(stage.path / MANIFEST_NAME, iter([manifest]), Silence())
            stage.commit()
            (progress or Silence()).finish()
        except BaseException:
            transaction.set_state("aborted")
            raise
        finally:
            keep_reading(files.engine, "materialize", resources.catalog)
        transaction.set_state("committed")
    written = total + len(manifest)
    return Materialized(destination, plan.plan_id, len(entries) + 1, written, totals, time.monotonic() - started)


class _Transaction:
    """The record of one run in the catalog."""

    def __init__(self, catalog: Catalog, plan: MergePlan, stage: Staging) -> None:
        self._catalog = catalog
        self._plan = plan
        self._stage = stage
        self._id = uuid.uuid4().hex
        self.set_state("begun")

    def set_state(self, state: str) -> None:
        """Write down that the run has come to ``state``."""
        self._catalog.keep_transaction(
            TransactionRecord(
                transaction_id=self._id,
                plan_id=self._plan.plan_id,
                destination=str(self._stage.destination),
                staging=str(self._stage.path),
                state=state,
                pid=os.getpid(),
                changed_ns=time.time_ns(),
            )
        )


def _check_destination(destination: Path, overwrite: bool, sources: Sequence[Path], kept: Sequence[Path]) -> None:
    """Refuse a destination that is in use, or that is tangled with a source, or that ``kept`` files lie in."""
    try:
        _check_place(destination, sources, kept)
        _check_contents(destination, overwrite)
    except OSError as error:
        raise MaterializeError(f"{destination}: cannot be used ({error.strerror}); choose another place") from None


def _check_place(destination: Path, sources: Sequence[Path], kept: Sequence[Path]) -> None:
    resolved = destination.resolve()
    for source in sources:
        if resolved == source or source.is_relative_to(resolved) or resolved.is_relative_to(source):
            raise MaterializeError(
                f"{destination}: is tangled with the source {source}, which must stay as it is; choose another place"
            )
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise MaterializeError(f"{destination}: is not a directory; choose another place")
    for path in kept:
        if path.resolve().is_relative_to(resolved):
            raise MaterializeError(f"{destination}: holds {path}, which must stay as it is; choose another place")
    if destination.is_mount():
        raise MaterializeError(f"{destination}: is a mount point; choose a directory below it")


def _check_contents(destination: Path, overwrite: bool) -> None:
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not overwrite:
        raise MaterializeError(
            f"{destination}: exists and is not empty; choose another place, or replace it with --overwrite"
        )
    if not any((destination / name).is_file() for name in (MANIFEST_NAME, "config.json")):
        raise MaterializeError(
            f"{destination}: is no model (it has neither {MANIFEST_NAME} nor config.json), and --overwrite replaces "
            "models only; choose another place, or empty the directory yourself"
        )


def _check_space(destination: Path, total: int) -> None:
    """Refuse to begin what cannot fit on the disk."""
    room = os.statvfs(destination.parent)
    free = room.f_bavail * room.f_frsize
    if free < total + _MARGIN:
        raise MaterializeError(
            f"{destination}: needs {format_size(total)} and the disk has {format_size(free)} free; free some space or "
            "choose another place"
        )
