"""``mergefs materialize``: one merged model, written as one transaction."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from blake3 import blake3

from mergefs import __version__
from mergefs.catalog.catalog import Catalog
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.readings import keep_reading
from mergefs.engine.resources import Resources
from mergefs.errors import MaterializeError, NonFiniteError, PlanError
from mergefs.materialize.journal import Journal, Prepared, Read, Recorded, Work
from mergefs.materialize.manifest import MANIFEST_NAME, Cost, Manifest, read_manifest
from mergefs.materialize.output import write_file
from mergefs.materialize.staging import Staging, cannot_create, locked
from mergefs.materialize.system import sync_directory
from mergefs.materialize.transaction import (
    Transaction,
    abandon,
    is_committed,
    is_work_of,
    refuse_unfinished,
    settle,
    unfinished,
)
from mergefs.materialize.verify import verify
from mergefs.materialize.writer import ModelWriter, Written, write_models
from mergefs.planner.identity import files_identity, identified, known_contents
from mergefs.planner.keeping import keep_plan
from mergefs.planner.plan import MergePlan
from mergefs.processors import usable_processors
from mergefs.progress import Progress, Silence
from mergefs.sources.ledger import LedgerTotals
from mergefs.statistics.contents import identify
from mergefs.statistics.identity import content_identity
from mergefs.units import format_size

_MARGIN: Final = 16 * 2**20
"""Room for directory entries, the journal and the manifest, beside the files themselves."""


class Interrupted(Enum):
    """What is done with the work of a run that was interrupted."""

    REFUSE = "refuse"
    RESUME = "resume"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class Materialized:
    """What was written, and what it cost.

    ``reused_bytes`` were there from an interrupted run, as their hashes prove. With ``already_there`` the destination
    was this very model, complete and verified, and nothing was written.
    """

    directory: Path
    plan_id: str
    manifest: str
    files: int
    bytes_written: int
    reused_bytes: int
    totals: LedgerTotals
    seconds: float
    already_there: bool = False


def materialize(
    plan: MergePlan,
    destination: Path,
    resources: Resources,
    overwrite: bool = False,
    progress: Progress | None = None,
    interrupted: Interrupted = Interrupted.REFUSE,
    threads: int | None = None,
) -> Materialized:
    """Write the model of ``plan`` to ``destination``, which appears complete or not at all.

    At most ``threads`` compute at a time, as many as there are processors where that is None.

    Raises MaterializeError when the destination is in the way or the disk fails, NonFiniteError and SourceChangedError
    for what the sources do; the destination is then as it was, and what is finished is kept for a run that resumes.
    """
    started = time.monotonic()
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 (Path.absolute keeps "..")
    kept = (Path(plan.recipe.origin), resources.catalog.path)
    _check_place(destination, [source.path for source in plan.sources], kept)
    _check_contents(destination, overwrite or interrupted is Interrupted.RESUME)
    files = ModelFiles(plan, resources, strict=True)
    _check_sources(files)
    with locked(destination) as stage:
        journal = settle(resources.catalog, stage)
        if journal is not None and interrupted is Interrupted.DISCARD:
            abandon(resources.catalog, stage, journal)
            journal = None
        resumed = interrupted is Interrupted.RESUME
        if journal is None and resumed and not overwrite and _holds(destination, plan, resources.catalog):
            return _already_there(destination, plan, resources, started, progress)
        _check_contents(destination, overwrite)
        if journal is not None and not (resumed and is_work_of(journal.work, plan)):
            raise refuse_unfinished(stage, journal, plan)
        run = _Run(plan, files, resources, stage, progress or Silence(), journal, threads or default_threads())
        manifest, written = run.write()
    return Materialized(
        directory=destination,
        plan_id=run.plan_id,
        manifest=manifest.manifest,
        files=len(written.files) + 1,
        bytes_written=sum(files.sizes.values()) + len(manifest.encode()),
        reused_bytes=written.reused_bytes,
        totals=resources.ledger.totals(),
        seconds=time.monotonic() - started,
    )


def default_threads() -> int:
    """Return how many threads compute where nobody says: one for each processor."""
    return usable_processors()


class _Run:
    """One run of the work, from the first byte to the commit, behind what ``journal`` tells of."""

    def __init__(
        self,
        plan: MergePlan,
        files: ModelFiles,
        resources: Resources,
        stage: Staging,
        progress: Progress,
        journal: Recorded | None,
        threads: int,
    ) -> None:
        self._threads = threads
        self._plan = plan
        self._files = files
        self._resources = resources
        self._stage = stage
        self._progress = progress
        self._total = sum(files.sizes.values())
        work = _layout(plan)
        # Pieces of another version, or of files that were cut otherwise, are of no use.
        same = journal is not None and (journal.work.mergefs_version, journal.work.layout) == (__version__, work)
        self._recorded = journal if same else None
        self._before = resources.ledger.totals()
        if journal is not None and not same:
            abandon(resources.catalog, stage, journal)
        _check_space(stage.destination, self._total - (stage.allocated_bytes() if same else 0))
        resumed = None if self._recorded is None else self._recorded.work.transaction_id
        self._transaction = Transaction.begin(resources.catalog, stage, plan.plan_id, resumed)
        files_now = files_identity(plan.all_inputs)
        its_id = self._transaction.record.transaction_id
        self._work = Work(its_id, plan.plan_id, __version__, work, self._total, files_now)

    @property
    def plan_id(self) -> str:
        """The plan that is written, as far as its inputs are known by now."""
        return self._transaction.record.plan_id

    def write(self) -> tuple[Manifest, Written]:
        """Write and commit the model. After an error the work is kept where another run can go on with it."""
        try:
            journal = self._open_journal()
            try:
                manifest, written = self._prepare(journal)
            finally:
                journal.close()
            self._stage.commit()
        except BaseException as error:
            if is_committed(self._transaction.record, self._stage):  # interrupted right behind the rename
                self._transaction.moved_to("committed")
                raise
            self._transaction.moved_to("aborted")
            if isinstance(error, NonFiniteError | PlanError) or unfinished(self._stage) is None:
                with suppress(OSError):
                    self._stage.remove()  # of no use to anybody
            raise
        finally:
            keep_reading(self._files.engine, "materialize", self._resources.catalog)
        self._transaction.moved_to("committed")
        self._progress.finish()
        with suppress(OSError):  # what was replaced; the next run tries again
            self._stage.remove()
        return manifest, written

    def _open_journal(self) -> Journal:
        """Return the journal that this run writes to."""
        try:
            if self._recorded is not None:
                self._stage.model.mkdir(parents=True, exist_ok=True)
                return Journal.go_on(self._stage.journal, self._recorded)
            self._stage.create()
            journal = Journal.begin(self._stage.journal, self._work)
            sync_directory(self._stage.path)  # or its name may be lost, and with it all that it will tell
            return journal
        except OSError as error:
            raise cannot_create(self._stage.path, error) from error

    def _prepare(self, journal: Journal) -> tuple[Manifest, Written]:
        """Bring everything to disk, so that only the rename is left."""
        self._progress.start("writing", self._total)
        proven = {} if self._recorded is None else self._recorded.pieces
        writer = ModelWriter(self._files, self._stage.model, journal, proven, self._progress, self._spent)
        write_models([writer], self._threads, self._resources.held_size)
        written = writer.written()
        _check_sources(self._files)  # what was written to meanwhile may have been read before and after
        content = content_identity(
            [(name, entry.dtype, entry.shape, written.contents[name]) for name, entry in written.tensors.items()]
        )
        catalog = self._resources.catalog
        if self._resources.learns:  # what was not read while it was merged is read now
            identify(self._plan.sources, catalog, self._resources.reader, self._progress)
        contents = known_contents(self._plan, catalog)
        manifest = Manifest.create(
            self._plan.asked, contents, content, __version__, self._cost(), written.files, written.tensors
        )
        write_file(self._stage.model / MANIFEST_NAME, manifest.encode())
        try:
            journal.append([Prepared(manifest.manifest)])
        except OSError as error:
            raise cannot_create(self._stage.journal, error) from error
        plan = identified(self._plan, catalog)
        if plan.plan_id != self.plan_id:  # what the inputs hold has become known since
            keep_plan(plan, catalog)
        self._transaction = self._transaction.prepared(plan.plan_id, manifest.manifest, content)
        return manifest, written

    def _spent(self) -> Read:
        """Keep what was learned of the inputs so far, and return what this run has read."""
        self._resources.catalog.flush()
        now = self._resources.ledger.totals()
        number = 0 if self._recorded is None else max(self._recorded.read, default=-1) + 1
        return Read(
            number,
            now.expert_bytes_read - self._before.expert_bytes_read,
            now.base_bytes_read - self._before.base_bytes_read,
        )

    def _cost(self) -> Cost:
        """Return what was planned, and what all runs have read until they last wrote it down."""
        runs = [self._spent(), *(() if self._recorded is None else self._recorded.read.values())]
        planned = self._plan.outcome.expert_bytes_planned
        return Cost(planned, sum(run.expert_bytes for run in runs), sum(run.base_bytes for run in runs))


def _layout(plan: MergePlan) -> str:
    """Return a hash of how the weight files of a plan are laid out."""
    hasher = blake3()
    for file in plan.files:
        hasher.update(f"{file.name} {file.size}\n".encode())
        hasher.update(file.header)
    return hasher.hexdigest()


def _holds(destination: Path, plan: MergePlan, catalog: Catalog) -> bool:
    """Return whether the destination is a model of this plan: as its manifest says, or else the catalog."""
    if not (destination / MANIFEST_NAME).is_file():
        return False
    manifest = read_manifest(destination)
    return manifest.whole_id == identified(plan, catalog).plan_id or any(
        (record.plan_id, record.manifest) == (plan.plan_id, manifest.manifest) for record in catalog.transactions()
    )


def _already_there(
    destination: Path, plan: MergePlan, resources: Resources, started: float, progress: Progress | None
) -> Materialized:
    """Return what is said of a model that an interrupted run has finished after all. Raises VerificationError."""
    found = verify(destination, progress)
    return Materialized(
        directory=destination,
        plan_id=plan.plan_id,
        manifest=read_manifest(destination).manifest,
        files=found.files + 1,
        bytes_written=0,
        reused_bytes=found.bytes_checked,
        totals=resources.ledger.totals(),
        seconds=time.monotonic() - started,
        already_there=True,
    )


def _check_sources(files: ModelFiles) -> None:
    """Raise SourceChangedError when a source is no longer what the plan was made from."""
    for name in files.sizes:
        files.check(name)


def _check_place(destination: Path, sources: Sequence[Path], kept: Sequence[Path]) -> None:
    """Refuse a destination that is tangled with a source, or that ``kept`` files lie in."""
    try:
        _refuse_tangled(destination, sources, kept)
    except OSError as error:
        raise _unusable(destination, error) from None


def _refuse_tangled(destination: Path, sources: Sequence[Path], kept: Sequence[Path]) -> None:
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
    """Refuse a destination that has something in it, unless that is a model that may be replaced."""
    try:
        if not destination.is_dir() or not any(destination.iterdir()):
            return
    except OSError as error:
        raise _unusable(destination, error) from None
    if not overwrite:
        raise MaterializeError(
            f"{destination}: exists and is not empty; choose another place, or replace it with --overwrite"
        )
    if not any((destination / name).is_file() for name in (MANIFEST_NAME, "config.json")):
        raise MaterializeError(
            f"{destination}: is no model (it has neither {MANIFEST_NAME} nor config.json), and --overwrite replaces "
            "models only; choose another place, or empty the directory yourself"
        )


def _unusable(destination: Path, error: OSError) -> MaterializeError:
    """Return the error for a destination that cannot be looked at."""
    return MaterializeError(f"{destination}: cannot be used ({error.strerror}); choose another place")


def _check_space(destination: Path, total: int) -> None:
    """Refuse to begin what cannot fit on the disk."""
    room = os.statvfs(destination.parent)
    free = room.f_bavail * room.f_frsize
    if free < total + _MARGIN:
        raise MaterializeError(
            f"{destination}: needs {format_size(total)} and the disk has {format_size(free)} free; free some space or "
            "choose another place"
        )
