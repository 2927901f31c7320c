"""The transaction of one materialization: its records in the catalog, and what becomes of one that was interrupted.

The journal in the staging directory and the manifests decide what happened, so a lost catalog loses nothing: work whose
manifest the destination has was committed; other work is gone on with, or given up. The catalog is brought into line.
"""

import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Literal

import msgspec

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import TransactionRecord
from mergefs.errors import MaterializeError
from mergefs.materialize.journal import Recorded, Work, read_journal
from mergefs.materialize.manifest import manifest_hash
from mergefs.materialize.staging import Staging, cannot_create
from mergefs.planner.identity import files_identity
from mergefs.planner.plan import MergePlan
from mergefs.planner.plan_ids import asked
from mergefs.units import format_size

State = Literal["begun", "prepared", "committed", "aborted"]

_OPEN: Final = ("begun", "prepared")


@dataclass(frozen=True, slots=True)
class Transaction:
    """One run of ``materialize``, or several that went on with each other's work, by its record in the catalog."""

    catalog: Catalog
    record: TransactionRecord

    @classmethod
    def begin(cls, catalog: Catalog, stage: Staging, plan_id: str, transaction_id: str | None = None) -> "Transaction":
        """Write down that work has begun, or goes on, and return it.

        Raises MaterializeError where the plan is not in the catalog any more: a transaction without one tells nothing.
        """
        record = TransactionRecord(
            transaction_id=transaction_id or uuid.uuid4().hex,
            plan_id=plan_id,
            destination=str(stage.destination),
            staging=str(stage.path),
            state="begun",
            pid=os.getpid(),
            changed_ns=time.time_ns(),
        )
        if not catalog.begin_transaction(record):
            raise MaterializeError(
                f"{stage.destination}: the plan {plan_id} was removed from {catalog.path} meanwhile, as "
                "`mergefs catalog gc` does with plans that nothing uses; run the command again"
            )
        return cls(catalog, record)

    def moved_to(self, state: State) -> "Transaction":
        """Write down that it has come to ``state``, and return it."""
        return self._with(_changed(self.record, state))

    def prepared(self, plan_id: str, manifest: str, content: str) -> "Transaction":
        """Write down that all is on disk, with these hashes, and return it.

        ``plan_id`` is that of the plan as far as its inputs are known by now; the one that the work has begun with
        stays where the catalog does not have that.
        """
        record = msgspec.structs.replace(_changed(self.record, "prepared"), manifest=manifest, content=content)
        better = msgspec.structs.replace(record, plan_id=plan_id)
        if plan_id != record.plan_id and self.catalog.begin_transaction(better):
            return replace(self, record=better)
        return self._with(record)

    def _with(self, record: TransactionRecord) -> "Transaction":
        self.catalog.keep_transaction(record)
        return replace(self, record=record)


def settle(catalog: Catalog, stage: Staging) -> Recorded | None:
    """Bring the remains of earlier runs to an end, and return the journal of work that can be gone on with.

    Only for who holds the lock of the destination: nobody else is at work there then. What is left of a commit is
    removed, and so is work of which nothing was finished. Raises MaterializeError.
    """
    try:
        journal = read_journal(stage.journal)
        there = manifest_hash(stage.destination)
        committed = journal is not None and _was_committed(journal, stage, there)
        usable = None if committed or journal is None or not _has_work(journal) else journal
        if usable is None and os.path.lexists(stage.path):
            stage.remove()
    except OSError as error:
        raise cannot_create(stage.path, error) from error
    its_id = None if journal is None else journal.work.transaction_id
    for record in catalog.transactions():
        if record.destination != str(stage.destination) or record.state not in _OPEN:
            continue
        if record.transaction_id == its_id:
            if usable is not None:
                continue  # it may be gone on with
            done = committed
        else:
            done = bool(record.manifest) and record.manifest == there
        catalog.keep_transaction(_changed(record, "committed" if done else "aborted"))
    return usable


def abandon(catalog: Catalog, stage: Staging, journal: Recorded) -> None:
    """Remove unfinished work, and write down that it was given up. Raises MaterializeError."""
    try:
        stage.remove()
    except OSError as error:
        raise cannot_create(stage.path, error) from error
    for record in catalog.transactions():
        if record.transaction_id == journal.work.transaction_id and record.state != "committed":
            catalog.keep_transaction(_changed(record, "aborted"))


def unfinished(stage: Staging) -> Recorded | None:
    """Return the journal of what an interrupted run has finished parts of, None where there is no such thing."""
    with suppress(OSError):
        journal = read_journal(stage.journal)
        return journal if journal is not None and _has_work(journal) else None
    return None


def describe(journal: Recorded) -> str:
    """Say how much of the work is done."""
    if journal.prepared is not None:
        return "all of it"
    done = min(journal.finished_bytes, journal.work.total_bytes)
    return f"{format_size(done)} of {format_size(journal.work.total_bytes)}"


def is_work_of(work: Work, plan: MergePlan) -> bool:
    """Return whether work is that of a plan: the same contents, or the same files, are merged in the same way."""
    same_files = work.files == files_identity(plan.all_inputs)
    return work.plan_id == plan.plan_id or (asked(work.plan_id) == plan.asked and same_files)


def refuse_unfinished(stage: Staging, journal: Recorded, plan: MergePlan) -> MaterializeError:
    """Return the error for work that is in the way: whose it is, and both ways out."""
    whose = "" if is_work_of(journal.work, plan) else f" of another plan, {journal.work.plan_id},"
    go_on = "go on with --resume, or " if not whose else ""
    return MaterializeError(
        f"{stage.destination}: an interrupted run{whose} has left {describe(journal)} in {stage.path}; "
        f"{go_on}throw that away and start anew with --fresh"
    )


def is_committed(record: TransactionRecord, stage: Staging) -> bool:
    """Return whether the destination is what a transaction has prepared."""
    return bool(record.manifest) and manifest_hash(stage.destination) == record.manifest


def _was_committed(journal: Recorded, stage: Staging, there: str | None) -> bool:
    """Return whether the rename that ended this work has taken place; ``there`` is what the destination has."""
    return journal.prepared is not None and (journal.prepared == there or not stage.model.exists())


def _has_work(journal: Recorded) -> bool:
    """Return whether anything of it is finished."""
    return journal.finished_bytes > 0 or journal.prepared is not None


def _changed(record: TransactionRecord, state: State) -> TransactionRecord:
    """Return the record of a transaction that has come to another state, now and by this process."""
    return msgspec.structs.replace(record, state=state, pid=os.getpid(), changed_ns=time.time_ns())
