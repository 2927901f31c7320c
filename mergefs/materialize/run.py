"""One model on its way to its destination, from the first byte to the commit."""

from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from mergefs import __version__
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.readings import keep_reading
from mergefs.engine.resources import Resources
from mergefs.errors import NonFiniteError, PlanError
from mergefs.materialize.destination import check_space
from mergefs.materialize.journal import Journal, Prepared, Read, Recorded, Work
from mergefs.materialize.manifest import MANIFEST_NAME, Cost, Manifest
from mergefs.materialize.output import write_file
from mergefs.materialize.staging import Staging, cannot_create
from mergefs.materialize.system import sync_directory
from mergefs.materialize.transaction import Transaction, abandon, is_committed, unfinished
from mergefs.materialize.writer import ModelWriter, Written
from mergefs.planner.identity import files_identity, identified, known_contents
from mergefs.planner.keeping import keep_plan
from mergefs.planner.plan import MergePlan
from mergefs.progress import Progress
from mergefs.statistics.contents import identify
from mergefs.statistics.identity import content_identity


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has written."""

    plan_id: str
    manifest: Manifest
    written: Written


class Run:
    """Writes one model by ``writer`` and commits it, behind what the ``recorded`` journal tells of.

    Whoever makes one completes it or gives it up. ``beside`` is how many bytes other runs need on the same disk.
    """

    def __init__(
        self,
        plan: MergePlan,
        files: ModelFiles,
        resources: Resources,
        stage: Staging,
        progress: Progress,
        recorded: Recorded | None,
        beside: int,
    ) -> None:
        self.total = sum(files.sizes.values())
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self._plan = plan
        self._files = files
        self._resources = resources
        self._stage = stage
        self._progress = progress
        self._journal: Journal | None = None
        self._over = False
        layout = _layout(plan)
        # Pieces of another version, or of files that were cut otherwise, are of no use.
        same = recorded is not None and (recorded.work.mergefs_version, recorded.work.layout) == (__version__, layout)
        self._recorded = recorded if same else None
        self._before = resources.ledger.totals()
        if recorded is not None and not same:
            abandon(resources.catalog, stage, recorded)
        self.needed = self.total - (stage.allocated_bytes() if same else 0)
        check_space(stage.destination, self.needed + beside)
        resumed = None if self._recorded is None else self._recorded.work.transaction_id
        self._transaction = Transaction.begin(resources.catalog, stage, plan.plan_id, resumed)
        files_now = files_identity(plan.all_inputs)
        its_id = self._transaction.record.transaction_id
        self._work = Work(its_id, plan.plan_id, __version__, layout, self.total, files_now)

    @property
    def disk(self) -> int:
        """The device that it is written to."""
        return self._stage.destination.parent.stat().st_dev

    def open(self) -> ModelWriter:
        """Begin with the journal, and return what writes the model. Raises MaterializeError."""
        self._journal = self._open_journal()
        proven = {} if self._recorded is None else self._recorded.parts
        self._writer = ModelWriter(self._files, self._stage.model, self._journal, proven, self._progress, self._spent)
        return self._writer

    def complete(self) -> None:
        """Commit what was written, or give it up with the ``error`` that has kept it from being complete."""
        try:
            written, journal = self._writer.written(), self._journal
            if journal is None:
                raise ValueError("a run that was not opened cannot be completed")
            manifest = self._prepare(written, journal)
            self._stage.commit()
        except Exception as error:
            self.error = error
            self.give_up(error)
            return
        self._over = True
        self._transaction = self._transaction.moved_to("committed")
        self.outcome = Outcome(self._transaction.record.plan_id, manifest, written)
        with suppress(OSError):  # what was replaced; the next run tries again
            self._stage.remove()

    def give_up(self, error: BaseException) -> None:
        """End after an error, unless it is complete; the work is kept where another run can go on with it."""
        if self._over:
            return
        self._over = True
        if is_committed(self._transaction.record, self._stage):  # interrupted right behind the rename
            self._transaction.moved_to("committed")
            return
        self._transaction.moved_to("aborted")
        if isinstance(error, NonFiniteError | PlanError) or unfinished(self._stage) is None:
            with suppress(OSError):
                self._stage.remove()  # of no use to anybody

    def close(self) -> None:
        """Close the journal, and keep in the catalog what was read."""
        if self._journal is not None:
            self._journal.close()
        keep_reading(self._files.engine, "materialize", self._resources.catalog, self._transaction.record.plan_id)

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

    def _prepare(self, written: Written, journal: Journal) -> Manifest:
        """Bring the rest to disk, so that only the rename is left."""
        check_sources(self._files)  # what was written to meanwhile may have been read before and after
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
        if plan.plan_id != self._transaction.record.plan_id:  # what the inputs hold has become known since
            keep_plan(plan, catalog)
        self._transaction = self._transaction.prepared(plan.plan_id, manifest.manifest, content)
        return manifest

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


def check_sources(files: ModelFiles) -> None:
    """Raise SourceChangedError when a source is no longer what the plan was made from."""
    for name in files.sizes:
        files.check(name)
