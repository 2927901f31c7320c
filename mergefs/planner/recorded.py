"""Plans made again from what the catalog keeps of them: what was selected is applied, and not selected anew."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from mergefs import __version__
from mergefs.catalog.records import PlanEntryRecord, PlanRecord
from mergefs.errors import CatalogError, PlanError
from mergefs.methods.registry import method_origin
from mergefs.planner.build import Draft, Planning
from mergefs.planner.everything import copied_from_the_base
from mergefs.planner.identity import IDS, files_identity
from mergefs.planner.keeping import keep_plan, recorded_selection
from mergefs.planner.levels import EQUAL, NOTHING, Coded
from mergefs.planner.options import PlanOptions
from mergefs.planner.plan import BudgetOutcome, MergePlan, TensorPlan
from mergefs.planner.plan_ids import asked
from mergefs.planner.workspace import Workspace
from mergefs.progress import Progress
from mergefs.recipe.definition import Recipe
from mergefs.recipe.model import parse_recipe
from mergefs.sources.place import Role
from mergefs.statistics.identity import is_local


def recorded_recipe(record: PlanRecord) -> tuple[Recipe, PlanOptions]:
    """Return the recipe and the options that a plan was made with.

    Raises CatalogError for a plan that was kept by a version of mergefs that kept less.
    """
    try:
        options = msgspec.convert(record.options, PlanOptions)
        msgspec.convert(record.outcome, BudgetOutcome)
    except msgspec.ValidationError as error:
        raise CatalogError(
            f"plan {record.plan_id} was kept by another version of mergefs and cannot be made again from the catalog "
            f"({error}); plan {record.origin} once more"
        ) from error
    return parse_recipe(record.recipe, record.origin, *map(Path, record.directories)), options


def recorded_plan(record: PlanRecord, workspace: Workspace, progress: Progress, identified: bool = False) -> MergePlan:
    """Return the plan that was kept as ``record``, with the same id; ``identified`` as in ``make_plan``.

    Inputs that the catalog does not know by their contents any more, since their files were copied or touched, are
    hashed again. Raises PlanError, which names what has changed, where the id would be another one; and the errors of
    recipes and checkpoints. A plan whose id is local has another one once its inputs have been analysed.
    """
    recipe, options = recorded_recipe(record)
    planning = Planning(recipe, options, workspace, progress)
    if identified or any(_lost_its_content(record, planning.draft)):
        planning.identify()
    tensors = _selected(record, planning.draft, workspace)
    outcome = msgspec.convert(record.outcome, BudgetOutcome)
    plan = replace(planning.plan_of(tensors, options, record.budget_bytes), outcome=outcome)
    if plan.plan_id != record.plan_id and not _only_better_known(record, plan):
        raise PlanError(f"plan {record.plan_id} cannot be made again: {_difference(record, planning.draft)}")
    if plan.plan_id != record.plan_id:
        note = f"plan {record.plan_id} is plan {plan.plan_id} now that the contents of its inputs are known"
        plan = replace(plan, notes=(*plan.notes, note))
    keep_plan(plan, workspace.catalog)
    return plan


def _selected(record: PlanRecord, draft: Draft, workspace: Workspace) -> tuple[TensorPlan, ...]:
    """Return the tensors of the draft with what was selected of each."""
    entries = {entry.name: entry for entry in workspace.catalog.plan_entries(record.plan_id)}
    names = {tensor.name for tensor in draft.tensors}
    if names != entries.keys():
        name = min(names ^ entries.keys())
        where = "has gone from" if name in entries else "has come to"
        raise PlanError(
            f"plan {record.plan_id} cannot be made again: tensor {name!r} {where} its inputs; plan {record.origin} anew"
        )
    return tuple(_with_selection(tensor, entries[tensor.name], record, workspace) for tensor in draft.tensors)


def _with_selection(tensor: TensorPlan, entry: PlanEntryRecord, record: PlanRecord, workspace: Workspace) -> TensorPlan:
    """Return one tensor as it was selected."""
    if entry.selection is None:
        return tensor
    chosen = copied_from_the_base(tensor)
    if entry.shape != chosen.shape or len(entry.selection.levels) != len(chosen.places):
        raise PlanError(
            f"plan {record.plan_id} cannot be made again: tensor {tensor.name!r} has shape {list(chosen.shape)} in "
            f"{len(chosen.places)} inputs now, and had {list(entry.shape)} in {len(entry.selection.levels)}; plan "
            f"{record.origin} anew"
        )
    selection = recorded_selection(entry.selection, chosen.grid)
    chosen = replace(chosen, selection=selection)
    planes = (selection.levels != NOTHING) & (selection.levels < EQUAL)
    if not planes.any():
        return chosen
    return replace(chosen, coded=_planes(chosen, record, workspace))


def _planes(tensor: TensorPlan, record: PlanRecord, workspace: Workspace) -> tuple[Coded | None, ...]:
    """Return the planes of every expert's delta; where some are needed and gone, the id tells."""
    if tensor.stand_in is None:
        return ()
    from mergefs.planes.coded import known_planes

    return tuple(
        known_planes(place, tensor.stand_in, tensor.compute, workspace.catalog) if role is Role.EXPERT else None
        for place, role in zip(tensor.places, tensor.roles, strict=True)
    )


def _pairs(record: PlanRecord, draft: Draft) -> Iterator[tuple[str, str, str, str]]:
    """Yield of every input its reference, where it lies now, its identity in the record, and its identity now."""
    for known, entry in zip(record.inputs, draft.all_inputs, strict=False):
        yield known.reference, entry.model.title, known.identity, entry.identity


def _lost_its_content(record: PlanRecord, draft: Draft) -> Iterator[bool]:
    """Yield of every input whether its contents were known, and are not."""
    for _, _, known, now in _pairs(record, draft):
        yield is_local(now) and not is_local(known)


def _only_better_known(record: PlanRecord, plan: MergePlan) -> bool:
    """Return whether a plan that knew inputs by their files alone is this one, which knows the same files' contents."""
    same_files = record.made_by.get("files") == files_identity(plan.all_inputs)
    return is_local(record.plan_id) and asked(record.plan_id) == plan.asked and same_files


def _made_differently(record: PlanRecord, draft: Draft) -> str | None:
    """Return what else than the inputs is another than it was, or None."""
    now = {"method": str(method_origin(record.method) or ""), "tokenizer": draft.tokenizer or ""}
    if now["method"] != record.made_by.get("method", ""):
        was = record.made_by.get("method") or "mergefs itself"
        return f"method {record.method} is that of {now['method'] or 'mergefs itself'} now, and was that of {was}"
    if now["tokenizer"] != record.made_by.get("tokenizer", ""):
        return "the merged tokenizer is another one now, since its files or the libraries that merge it have changed"
    return None


def _difference(record: PlanRecord, draft: Draft) -> str:
    """Return what has changed since the plan was made, and what to do."""
    remedy = f"restore it, or plan {record.origin} anew"
    if record.made_by.get("ids") != IDS:
        return f"it was kept by a version of mergefs that named plans otherwise; plan {record.origin} anew"
    for reference, title, known, now in _pairs(record, draft):
        if known != now:
            identities = f"its identity is {now[:18]}... and was {known[:18]}..."
            return f"{title}, the recipe's {reference!r}, is not what it was ({identities}); {remedy}"
    other = _made_differently(record, draft)
    if other is not None:
        return f"{other}; {remedy}"
    was = record.made_by.get("mergefs", "")
    if was != __version__:
        return f"it was made by mergefs {was}, and this is {__version__}; plan {record.origin} anew"
    return f"the planes of its experts' deltas are gone or have been coded anew; plan {record.origin} anew"
