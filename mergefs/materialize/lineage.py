"""``mergefs log``: what a model, a plan or a run was made of, and of what that was made in turn.

A directory tells it in ``mergefs.json``, wherever it was moved to, and what the inputs held in its manifest; a mounted
one has no manifest, and the id of its plan as an attribute. What an input's directory does not tell is looked for in
the catalog by the contents of the input: they are what a run has written, or they are not.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import InputRecord, PlanRecord, TransactionRecord
from mergefs.checkpoint.checkpoint import open_checkpoint
from mergefs.errors import CheckpointError, LineageError
from mergefs.materialize.manifest import manifest_hash
from mergefs.planner.ancestry import PROVENANCE_NAME, Ancestor, Ancestry, UnreadableProvenanceError, read_ancestry
from mergefs.planner.plan_ids import PLAN_ID_ATTRIBUTE, asked, meant_by
from mergefs.statistics.identity import checkpoint_identity, is_local

_SHORTEST_PREFIX: Final = 4


@dataclass(frozen=True, slots=True)
class Run:
    """One run of ``materialize``: where it wrote to, how it stands, and when that was (nanoseconds since 1970)."""

    transaction_id: str
    plan_id: str
    state: str
    destination: str
    changed_ns: int
    manifest: str

    @classmethod
    def of(cls, record: TransactionRecord) -> "Run":
        """Return what a record of the catalog says."""
        return cls(
            record.transaction_id,
            record.plan_id,
            record.state,
            record.destination,
            record.changed_ns,
            record.manifest,
        )


@dataclass(frozen=True, slots=True)
class Lineage:
    """A model and what it was made of. What is not known is empty; ``runs`` are those that have written it."""

    name: str
    role: str = ""
    identity: str = ""
    plan_id: str = ""
    method: str = ""
    runs: tuple[Run, ...] = ()
    inputs: tuple["Lineage", ...] = ()


def lineage(target: str, catalog: Catalog) -> Lineage:
    """Return the lineage of a directory, or of a plan or a run by its id or the beginning of it.

    Raises LineageError where nothing is known, or where several are meant.
    """
    directory = Path(target)
    if directory.is_dir():
        return _of_directory(directory, catalog)
    transactions = _runs_meant(target, catalog)
    plans = _plans_meant(target, catalog)
    if not transactions and not plans:
        raise LineageError(
            f"{target!r} is neither a directory nor the id of a plan or a run in {catalog.path}; list what there is "
            "with `mergefs log`, or name another catalog with --catalog"
        )
    if len(transactions) + len(plans) > 1:
        meant = [*(record.plan_id for record in plans), *(record.transaction_id for record in transactions)]
        raise LineageError(f"{target!r} begins several ids: {', '.join(sorted(meant))}; write out more of it")
    if transactions:
        record = transactions[0]
        plan = catalog.plan(record.plan_id)
        found = _of_plan_id(record.plan_id, plan, catalog)
        return replace(found, name=record.destination, runs=(Run.of(record),))
    return _of_plan_id(plans[0].plan_id, plans[0], catalog)


def runs(catalog: Catalog) -> list[Run]:
    """Return every run that the catalog knows, the latest first."""
    return [Run.of(record) for record in sorted(catalog.transactions(), key=lambda one: -one.changed_ns)]


def _runs_meant(beginning: str, catalog: Catalog) -> list[TransactionRecord]:
    """Return the runs whose id is ``beginning``, or begins with it where that is not too short."""
    records = catalog.transactions()
    exact = [record for record in records if record.transaction_id == beginning]
    if exact or len(beginning) < _SHORTEST_PREFIX:
        return exact
    return [record for record in records if record.transaction_id.startswith(beginning)]


def _plans_meant(beginning: str, catalog: Catalog) -> list[PlanRecord]:
    """Return the plans that may be meant by the beginning of an id."""
    records = {record.plan_id: record for record in catalog.plans()}
    if len(beginning) < _SHORTEST_PREFIX:
        return []
    return [records[plan_id] for plan_id in meant_by(beginning, records)]


def _of_directory(directory: Path, catalog: Catalog) -> Lineage:
    """Return the lineage of the model in a directory."""
    try:
        ancestry = read_ancestry(directory)
    except UnreadableProvenanceError as error:
        raise LineageError(
            f"{directory / PROVENANCE_NAME}: cannot be read ({error}); restore it, or give the id of the plan"
        ) from error
    if ancestry is not None:
        manifest = manifest_hash(directory)
        written = [one for one in catalog.transactions() if manifest is not None and one.manifest == manifest]
        known = {one.plan_id for one in written} or {_shown_plan(directory)} - {""}
        plan_id = known.pop() if len(known) == 1 else ancestry.whole_id
        ancestry = _with_identities(ancestry, catalog.plan(plan_id))
        found = _of_ancestry(str(directory), ancestry, tuple(map(Run.of, written)), catalog)
        return replace(found, plan_id=plan_id)
    try:
        checkpoint = open_checkpoint(directory)
    except CheckpointError as error:
        raise LineageError(f"{directory} has no {PROVENANCE_NAME}, and is no model: {error}") from error
    found = _of_contents(str(directory), "", checkpoint_identity(checkpoint, catalog), catalog)
    if not found.plan_id:
        raise LineageError(
            f"{directory} has no {PROVENANCE_NAME}, and nothing in {catalog.path} has written what it holds; give the "
            "model as it was written, or run `mergefs analyze` on it, so that it is known by its contents"
        )
    return found


def _shown_plan(directory: Path) -> str:
    """Return the id of the plan that a mounted directory shows; empty for one that is not mounted."""
    try:
        return os.getxattr(directory, PLAN_ID_ATTRIBUTE).decode(errors="replace")
    except OSError:
        return ""


def _with_identities(ancestry: Ancestry, plan: PlanRecord | None) -> Ancestry:
    """Return an ancestry with the contents of inputs that it does not tell and the catalog's record of its plan does.

    The references of both are the same where it is its plan.
    """
    if plan is None or [one.reference for one in ancestry.all_inputs] != [entry.reference for entry in plan.inputs]:
        return ancestry
    known = [
        one if one.identity or is_local(entry.identity) else msgspec.structs.replace(one, identity=entry.identity)
        for one, entry in zip(ancestry.all_inputs, plan.inputs, strict=True)
    ]
    count = len(ancestry.inputs)
    return msgspec.structs.replace(ancestry, inputs=tuple(known[:count]), stand_in=next(iter(known[count:]), None))


def _of_ancestry(
    name: str,
    ancestry: Ancestry,
    written: tuple[Run, ...],
    catalog: Catalog,
    above: frozenset[str] = frozenset(),
) -> Lineage:
    """Return what a ``mergefs.json`` tells."""
    inputs = tuple(_of_ancestor(one, catalog, above | {asked(ancestry.plan_id)}) for one in ancestry.all_inputs)
    return Lineage(name, plan_id=ancestry.whole_id, method=ancestry.method, runs=written, inputs=inputs)


def _of_ancestor(one: Ancestor, catalog: Catalog, above: frozenset[str]) -> Lineage:
    """Return an input as a ``mergefs.json`` tells of it, or as the catalog does where that is silent."""
    if one.made_by is not None:
        found = _of_ancestry(one.reference, one.made_by, (), catalog, above)
        return replace(found, role=one.role, identity=one.identity)
    if one.inputs:
        inputs = tuple(_of_ancestor(inner, catalog, above) for inner in one.inputs)
        return Lineage(one.reference, one.role, one.identity, plan_id=one.identity or one.structure, inputs=inputs)
    return _of_contents(one.reference, one.role, one.identity, catalog, above)


def _of_contents(name: str, role: str, identity: str, catalog: Catalog, above: frozenset[str] = frozenset()) -> Lineage:
    """Return what the catalog knows of a model with these contents: who has first written them.

    ``above`` is what the plans ask for that it is an input of; a merge may leave its input as it was, and is no parent
    of it then.
    """
    alone = Lineage(name, role, identity)
    if not identity or is_local(identity):
        return alone
    written = [
        one
        for one in catalog.transactions()
        if one.content == identity and one.state == "committed" and asked(one.plan_id) not in above
    ]
    if not written:
        return alone
    first = min(written, key=lambda one: one.changed_ns)
    found = _of_plan_id(first.plan_id, catalog.plan(first.plan_id), catalog, above)
    return replace(found, name=name, role=role, identity=identity, runs=tuple(map(Run.of, written)))


def _of_plan_id(
    plan_id: str, plan: PlanRecord | None, catalog: Catalog, above: frozenset[str] = frozenset()
) -> Lineage:
    """Return the lineage of a plan: as a model that it has written tells it, else as the catalog does."""
    written = [record for record in catalog.transactions() if record.plan_id == plan_id]
    found = None
    for record in written:
        destination = Path(record.destination)
        if not record.manifest or manifest_hash(destination) != record.manifest:
            continue
        with suppress(UnreadableProvenanceError):
            ancestry = read_ancestry(destination)
            if ancestry is not None:
                found = _of_ancestry(plan_id, _with_identities(ancestry, plan), (), catalog, above)
    if found is None and plan is not None:
        inputs = tuple(_of_input(entry, catalog, above | {asked(plan_id)}) for entry in plan.inputs)
        found = Lineage(plan.origin, method=plan.method, inputs=inputs)
    found = Lineage(plan_id) if found is None else found
    name = found.name if plan is None else plan.origin
    return replace(found, name=name, plan_id=plan_id, runs=tuple(map(Run.of, written)))


def _of_input(entry: InputRecord, catalog: Catalog, above: frozenset[str]) -> Lineage:
    """Return an input of a plan in the catalog: as its directory tells, else as the catalog does."""
    try:
        ancestry = read_ancestry(Path(entry.path))
    except UnreadableProvenanceError:
        ancestry = None
    if ancestry is None:
        return _of_contents(entry.reference, entry.role, entry.identity, catalog, above)
    found = _of_ancestry(entry.reference, ancestry, (), catalog, above)
    return replace(found, role=entry.role, identity=entry.identity)
