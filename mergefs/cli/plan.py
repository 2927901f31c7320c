"""``mergefs plan``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.options import max_shard_size_option, recipe_options
from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.planner.plan import MergePlan, PlanInput


@click.command(name="plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@recipe_options
@max_shard_size_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    recipe: Path,
    budget: str | None,
    base: str | None,
    random_seed: int,
    max_shard_size: int,
    as_json: bool,
) -> None:
    """Show what a recipe reads and what it costs, without reading more than it must.

    A budget below 100 % needs statistics of every block; what the catalog lacks is gathered first.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.planner.build import PlanOptions, make_plan
    from mergefs.recipe.model import load_recipe
    from mergefs.sources.ledger import Ledger

    ledger = Ledger()
    with Catalog(settings.catalog or default_location()) as catalog, progress() as listener:
        options = PlanOptions(budget, base, random_seed, max_shard_size)
        plan = make_plan(load_recipe(recipe), options, catalog, ledger, listener)
    analysis = ledger.totals().analysis_bytes_read
    if as_json:
        print_json(_json(plan, analysis))
    else:
        _print(plan, analysis)


def _json(plan: "MergePlan", analysis: int) -> dict[str, object]:
    """Return the plan for programs."""
    return {
        "plan_id": plan.plan_id,
        "method": plan.recipe.method,
        "experts": [
            {
                "reference": entry.reference,
                "path": str(entry.checkpoint.path),
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
    """Return each expert with its bytes and those that are bought."""
    from mergefs.planner.plan import Role

    rows = []
    for index, entry in enumerate(plan.inputs):
        if entry.role is not Role.EXPERT:
            continue
        total = planned = 0
        for tensor in plan.tensors.values():
            if tensor.context is None:
                continue
            total += tensor.places[index].tensor.nbytes
            planned += tensor.planned_bytes(index)
        rows.append((entry, total, planned))
    return rows


def _print(plan: "MergePlan", analysis: int) -> None:
    """Print the plan for people."""
    from mergefs.cli.output import print_pairs, print_table
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
            "predicted error": f"{outcome.predicted_relative_error:.4f} of the merged delta (an estimate)",
            "analysis read": format_size(analysis),
        }
    )
    rows = [
        (entry.reference, format_size(total), format_size(planned), f"{planned / total:.1%}" if total else "-")
        for entry, total, planned in _experts(plan)
    ]
    print_table(("expert", "size", "planned", "share"), rows, numeric=(1, 2, 3))
    for note in plan.notes:
        click.echo(f"note: {note}")
