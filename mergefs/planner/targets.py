"""What commands are pointed at: the file of a recipe, a variant of it, or a plan that the catalog keeps."""

from dataclasses import replace
from pathlib import Path

from mergefs.catalog.catalog import Catalog
from mergefs.catalog.records import PlanRecord
from mergefs.errors import PlanError, UsageError
from mergefs.planner.build import make_plan
from mergefs.planner.options import PlanOptions
from mergefs.planner.plan import MergePlan
from mergefs.planner.plan_ids import meant_by, names_plan, reads_as_id
from mergefs.planner.recorded import recorded_plan, recorded_recipe
from mergefs.planner.workspace import Workspace
from mergefs.progress import Progress, Silence
from mergefs.recipe.definition import Recipe
from mergefs.recipe.model import load_recipe
from mergefs.recipe.variants import parse_variant, vary


def plan_target(
    target: Path,
    options: PlanOptions,
    workspace: Workspace,
    progress: Progress | None = None,
    identified: bool = False,
) -> MergePlan:
    """Return the plan of the recipe file ``target``, of a variant of it, or the kept plan whose id begins so.

    ``identified`` is as in ``make_plan``. A variant is written as ``FILE@CHANGES``; see ``mergefs.recipe.variants``.
    Where both are there the file is meant, which a note of the plan tells. Raises PlanError when no kept plan, or more
    than one, has such an id, UsageError when ``options`` are given for a plan that has its own, and the errors of
    making plans.
    """
    listener = progress or Silence()
    if names_plan(target):
        record = find_record(str(target), workspace.catalog)
        _refuse_options(record, options)
        return recorded_plan(record, workspace, listener, identified)
    plan = make_plan(*_read(target, options, None), workspace, listener, identified)
    if not reads_as_id(target.name) or workspace.catalog.plan(target.name) is None:
        return plan
    note = f"{target} is the file of that name here, and not the plan with that id; rename the file to get at the plan"
    return replace(plan, notes=(*plan.notes, note))


def recipe_target(
    target: Path, options: PlanOptions, catalog: Catalog, current: Path | None = None
) -> tuple[Recipe, PlanOptions]:
    """Return a recipe and the options to plan it with; of a kept plan its own, but for a budget in ``options``.

    ``current`` is as in ``load_recipe``. Raises the errors of ``plan_target``.
    """
    if not names_plan(target):
        return _read(target, options, current)
    record = find_record(str(target), catalog)
    _refuse_options(record, replace(options, budget=None))
    recipe, own = recorded_recipe(record)
    return recipe, replace(own, budget=options.budget)


def _read(target: Path, options: PlanOptions, current: Path | None) -> tuple[Recipe, PlanOptions]:
    """Return the recipe in a file, or a variant of it, which may have its own budget."""
    name, separator, changes = target.name.partition("@")
    if not separator or target.exists() or not (file := target.with_name(name)).is_file():
        return load_recipe(target, current), options
    variant = parse_variant(changes)
    return vary(load_recipe(file, current), variant), replace(options, budget=variant.budget or options.budget)


def _refuse_options(record: PlanRecord, options: PlanOptions) -> None:
    """Refuse options where a plan has its own."""
    if options != PlanOptions():
        raise UsageError(
            f"plan {record.plan_id} has its budget and its other options already; give its recipe, {record.origin}, "
            "to plan it otherwise"
        )


def find_record(prefix: str, catalog: Catalog) -> PlanRecord:
    """Return the kept plan whose id is ``prefix``, or the only one that is meant by it (``meant_by``).

    Raises PlanError.
    """
    found = catalog.plan(prefix)
    if found is not None:
        return found
    records = {record.plan_id: record for record in catalog.plans()}
    meant = meant_by(prefix, records)
    if len(meant) == 1:
        return records[meant[0]]
    if not meant:
        raise PlanError(
            f"{prefix}: there is no file of that name, and no plan in {catalog.path} whose id begins so; "
            "`mergefs catalog ls` lists the plans"
        )
    listed = ", ".join(meant[:5]) + (", ..." if len(meant) > 5 else "")
    raise PlanError(f"{prefix}: {len(meant)} plans have ids that begin so ({listed}); give more digits")
