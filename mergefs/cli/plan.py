"""``mergefs plan``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.options import MERGEKIT_EPILOG, PlanArguments, plan_arguments
from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.planner.plan import MergePlan, PlanInput


@click.command(name="plan", epilog=MERGEKIT_EPILOG)
@click.argument("recipe", type=click.Path(path_type=Path))
@plan_arguments
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(settings: Settings, recipe: Path, arguments: PlanArguments, as_json: bool) -> None:
    """Show what a recipe reads and what it costs, without reading more than it must.

    A budget below 100 % needs statistics of every block; what the catalog lacks is gathered first.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.engine.workspace import Workspace
    from mergefs.planner.build import make_plan
    from mergefs.recipe.model import load_recipe

    workspace = Workspace.create(Catalog(settings.catalog or default_location()))
    try:
        with progress(settings.quiet) as listener:
            plan = make_plan(load_recipe(recipe), arguments.options(), workspace, listener)
    finally:
        workspace.close()
    analysis = workspace.ledger.totals().analysis_bytes_read
    if as_json:
        print_json(_json(plan, analysis))
    else:
        _print(plan, analysis, notes=not settings.quiet)


def _json(plan: "MergePlan", analysis: int) -> dict[str, object]:
    """Return the plan for programs."""
    return {
        "plan_id": plan.plan_id,
        "method": plan.recipe.method,
        "experts": [
            {
                "reference": entry.reference,
                "path": entry.model.title,
                "identity": entry.identity,
                "bytes_total": total,
                "bytes_planned": planned,
            }
            for entry, total, planned in _experts(plan)
        ],
        **asdict(plan.outcome),
        "analysis_bytes_read": analysis,
        "files": [{"name": file.name, "size": file.size} for file in plan.files],
        "notes": list(plan.notes),
    }


def _experts(plan: "MergePlan") -> list[tuple["PlanInput", int, int]]:
    """Return each expert with the bytes that the merge reads of it, and those that are bought."""
    from mergefs.sources.place import Role

    experts = [entry for entry in plan.inputs if entry.role is Role.EXPERT]
    owners = {
        shard.path: index for index, entry in enumerate(experts) for s in entry.model.sources for shard in s.shards
    }
    total, planned = [0] * len(experts), [0] * len(experts)
    for tensor in plan.tensors.values():
        for number, place in enumerate(tensor.places):
            paid = next((stored for stored in place.stored() if stored.role is Role.EXPERT), None)
            owner = None if paid is None else owners.get(paid.shard.path)
            if owner is not None:
                total[owner] += place.total_bytes_read(Role.EXPERT)
                planned[owner] += tensor.planned_bytes(number)
    return list(zip(experts, total, planned, strict=True))


def _print(plan: "MergePlan", analysis: int, notes: bool) -> None:
    """Print the plan for people."""
    from mergefs.cli.output import print_pairs, print_table
    from mergefs.reports.wording import largest_error, predicted_error
    from mergefs.units import format_size

    outcome = plan.outcome
    share = outcome.expert_bytes_planned / outcome.expert_bytes_total if outcome.expert_bytes_total else 0.0
    print_pairs(
        {
            "plan": plan.plan_id,
            "method": plan.recipe.method,
            "budget": "none" if outcome.budget_bytes is None else format_size(outcome.budget_bytes),
            "experts": f"{format_size(outcome.expert_bytes_planned)} of {format_size(outcome.expert_bytes_total)} "
            f"({share:.1%}), {outcome.blocks_selected} of {outcome.blocks_total} blocks",
            "base": format_size(outcome.base_bytes),
            "output": f"{format_size(outcome.output_bytes)} in {len(plan.files)} file{'s' * (len(plan.files) != 1)}",
            "predicted error": predicted_error(outcome),
            "error at most": largest_error(outcome),
            "analysis read": format_size(analysis),
        }
    )
    rows = [
        (entry.reference, format_size(total), format_size(planned), f"{planned / total:.1%}" if total else "-")
        for entry, total, planned in _experts(plan)
    ]
    print_table(("expert", "size", "planned", "share"), rows, numeric=(1, 2, 3))
    for note in plan.notes if notes else ():
        click.echo(f"note: {note}")
