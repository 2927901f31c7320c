"""``mergefs materialize``: merged models, each written as one transaction."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mergefs.catalog.catalog import Catalog
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.resources import Resources
from mergefs.materialize.destination import check_contents, check_place
from mergefs.materialize.manifest import MANIFEST_NAME, read_manifest
from mergefs.materialize.run import Run, check_sources
from mergefs.materialize.staging import locked
from mergefs.materialize.transaction import abandon, is_work_of, refuse_unfinished, settle
from mergefs.materialize.verify import verify
from mergefs.materialize.writer import write_models
from mergefs.planner.identity import identified
from mergefs.planner.plan import MergePlan
from mergefs.processors import usable_processors
from mergefs.progress import Progress, Silence
from mergefs.sources.ledger import LedgerTotals


class Interrupted(Enum):
    """What is done with the work of a run that was interrupted."""

    REFUSE = "refuse"
    RESUME = "resume"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class Materialized:
    """What was written, and what it cost.

    ``reused_bytes`` of the ``bytes_written`` were there from an interrupted run, as their hashes prove;
    ``shared_bytes`` lie on disk once, for the model and for the sources that they are copies of. With ``already_there``
    the destination was this very model, complete and verified, and nothing was written.
    """

    directory: Path
    plan_id: str
    manifest: str
    files: int
    bytes_written: int
    reused_bytes: int
    totals: LedgerTotals
    seconds: float
    shared_bytes: int = 0
    already_there: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """A plan, and where its model is to be."""

    plan: MergePlan
    destination: Path


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

    At most ``threads`` compute at a time, ``default_threads`` where that is None.

    Raises MaterializeError when the destination is in the way or the disk fails, NonFiniteError and SourceChangedError
    for what the sources do; the destination is then as it was, and what is finished is kept for a run that resumes.
    """
    order = Order(plan, destination)
    (found,) = materialize_together([order], resources, overwrite, progress, interrupted, threads)
    if isinstance(found, Exception):
        raise found
    return found


def materialize_together(
    orders: Sequence[Order],
    resources: Resources,
    overwrite: bool = False,
    progress: Progress | None = None,
    interrupted: Interrupted = Interrupted.REFUSE,
    threads: int | None = None,
) -> list[Materialized | Exception]:
    """Write several models as ``materialize`` does each of them, in step: blocks that several need are read once.

    Returns for each of them what was written, or the error that it ended with, which does the others no harm. What they
    are said to have read is what all of them have read together. Raises errors that are seen before the first byte is
    written; nothing is written then.
    """
    started = time.monotonic()
    listener = progress or Silence()
    results: dict[int, Materialized | Exception] = {}
    runs: dict[int, Run] = {}
    with ExitStack() as locks:
        try:
            for number, order in enumerate(orders):
                beside = list(runs.values())
                found = _begin(order, resources, overwrite, listener, interrupted, locks, beside, started)
                if isinstance(found, Run):
                    runs[number] = found
                else:
                    results[number] = found
            if runs:
                listener.start("writing", sum(run.total for run in runs.values()))
                writers = [run.open() for run in runs.values()]
                write_models(writers, threads or default_threads(), resources.held_size)
            for run in runs.values():
                run.complete()
            if runs:
                listener.finish()
        except BaseException as error:
            for run in runs.values():
                run.give_up(error)
            raise
        finally:
            for run in runs.values():
                run.close()
    for number, run in runs.items():
        results[number] = _result(run, orders[number], resources, started)
    return [results[number] for number in range(len(orders))]


def _begin(
    order: Order,
    resources: Resources,
    overwrite: bool,
    progress: Progress,
    interrupted: Interrupted,
    locks: ExitStack,
    beside: Sequence[Run],
    started: float,
) -> Run | Materialized:
    """Take the lock of a destination and begin a run there, unless the model is there already.

    ``beside`` are the runs that have begun before.
    """
    plan, destination = order.plan, Path(os.path.abspath(order.destination))  # noqa: PTH100 (absolute() keeps "..")
    kept = (Path(plan.recipe.origin), resources.catalog.path)
    check_place(destination, [source.path for source in plan.sources], kept)
    check_contents(destination, overwrite or interrupted is Interrupted.RESUME)
    files = ModelFiles(plan, resources, strict=True)
    check_sources(files)
    stage = locks.enter_context(locked(destination))
    journal = settle(resources.catalog, stage)
    if journal is not None and interrupted is Interrupted.DISCARD:
        abandon(resources.catalog, stage, journal)
        journal = None
    resumed = interrupted is Interrupted.RESUME
    if journal is None and resumed and not overwrite and _holds(destination, plan, resources.catalog):
        return _already_there(destination, plan, resources, started, progress)
    check_contents(destination, overwrite)
    if journal is not None and not (resumed and is_work_of(journal.work, plan)):
        raise refuse_unfinished(stage, journal, plan)
    disk = destination.parent.stat().st_dev
    return Run(plan, files, resources, stage, progress, journal, sum(run.needed for run in beside if run.disk == disk))


def _result(run: Run, order: Order, resources: Resources, started: float) -> Materialized | Exception:
    """Return how a run has ended."""
    if run.outcome is None:
        return run.error or ValueError("a run that was not completed")
    manifest, written = run.outcome.manifest, run.outcome.written
    return Materialized(
        directory=Path(os.path.abspath(order.destination)),  # noqa: PTH100 (absolute() keeps "..")
        plan_id=run.outcome.plan_id,
        manifest=manifest.manifest,
        files=len(written.files) + 1,
        bytes_written=run.total + len(manifest.encode()),
        reused_bytes=written.reused_bytes,
        totals=resources.ledger.totals(),
        seconds=time.monotonic() - started,
        shared_bytes=written.shared_bytes,
    )


def default_threads() -> int:
    """Return how many threads compute where nobody says: one more than there are processors, if there are several.

    It fills the moments in which another waits for Python. A single processor never waits for that.
    """
    processors = usable_processors()
    return processors + (processors > 1)


def _holds(destination: Path, plan: MergePlan, catalog: Catalog) -> bool:
    """Return whether the destination is a model of this plan: as its manifest says, or else the catalog."""
    if not (destination / MANIFEST_NAME).is_file():
        return False
    manifest = read_manifest(destination)
    return manifest.whole_id == identified(plan, catalog).plan_id or any(
        (record.plan_id, record.manifest) == (plan.plan_id, manifest.manifest) for record in catalog.transactions()
    )


def _already_there(
    destination: Path, plan: MergePlan, resources: Resources, started: float, progress: Progress
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
