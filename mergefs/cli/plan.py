"""``mergefs plan``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.options import MERGEKIT_EPILOG, PlanArguments, memory_option, plan_arguments
from mergefs.cli.settings import Settings
from mergefs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergefs.planner.plan import MergePlan, PlanInput
    from mergefs.planner.planes_offer import PlanesOffer
    from mergefs.reports.curve import Point


@click.command(name="plan", epilog=MERGEKIT_EPILOG)
@click.argument("recipe", metavar="RECIPE_OR_PLAN", type=click.Path(path_type=Path))
@plan_arguments
@click.option("--sweep", metavar="LIST", help="Show what several budgets would bring: 1%,5%,25%,100%. Keeps no plan.")
@click.option("--plot", metavar="FILE.png", type=click.Path(path_type=Path), help="Draw the curve of the sweep.")
@memory_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    recipe: Path,
    arguments: PlanArguments,
    sweep: str | None,
    plot: Path | None,
    memory: int,
    as_json: bool,
) -> None:
    """Show what a recipe reads and what it costs, without reading more than it must.

    A budget below 100 % needs statistics of every block; what the catalog lacks is gathered first. The plan is kept in
    the catalog: its id, or the beginning of it, can be given in place of the recipe from then on.
    """
    if sweep is not None:
        _sweep(settings, recipe, arguments, sweep, plot, memory, as_json)
        return
    if plot is not None:
        raise UsageError("--plot draws the curve of a sweep; say of which budgets: --sweep 5%,25%,50%,100%")
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.engine.workspace import Workspace
    from mergefs.planner.planes_offer import planes_offer
    from mergefs.planner.targets import plan_target

    workspace = Workspace.create(Catalog(settings.catalog or default_location()), planning_size=memory)
    try:
        with progress(settings.quiet) as listener:
            plan = plan_target(recipe, arguments.options(), workspace, listener)
        offer = planes_offer(plan, workspace)
    finally:
        workspace.close()
    analysis = workspace.ledger.totals().analysis_bytes_read
    if as_json:
        print_json({**_json(plan, analysis), "planes_offer": None if offer is None else asdict(offer)})
        return
    _print(plan, analysis, notes=not settings.quiet)
    if offer is not None and not settings.quiet:
        click.echo(_advertised(offer, recipe))


def _advertised(offer: "PlanesOffer", recipe: Path) -> str:
    """Return what delta planes would bring and cost, as a sentence."""
    from mergefs.units import format_duration, format_size

    brings = (
        "may bring more, which only a try can tell"
        if offer.relative_error is None
        else f"would bring the predicted error to about {offer.relative_error:.2g}"
    )
    return (
        f"delta planes {brings}: `mergefs analyze {recipe} --planes {offer.planes}` takes {format_size(offer.nbytes)} "
        f"of disk and about {format_duration(offer.core_seconds)} of one core"
    )


def _sweep(
    settings: Settings,
    target: Path,
    arguments: PlanArguments,
    sweep: str,
    plot: Path | None,
    memory: int,
    as_json: bool,
) -> None:
    """Print, and draw, what several budgets would bring."""
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.files import write_whole
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.engine.workspace import Workspace
    from mergefs.planner.sweep import parse_sweep
    from mergefs.planner.sweep import sweep as plans_within
    from mergefs.planner.targets import recipe_target
    from mergefs.reports.curve import draw, format_of, point

    if arguments.budget is not None:
        raise UsageError("--budget and --sweep both say what may be read; give one of them")
    budgets = parse_sweep(sweep)
    kind = None if plot is None else format_of(plot)
    workspace = Workspace.create(Catalog(settings.catalog or default_location()), planning_size=memory)
    try:
        with progress(settings.quiet) as listener:
            recipe, options = recipe_target(target, arguments.options(), workspace.catalog)
            plans = plans_within(recipe, options, budgets, workspace, listener)
            points = [point(budget, plan) for budget, plan in zip(budgets, plans, strict=True)]
    finally:
        workspace.close()
    if plot is not None and kind is not None:
        write_whole(plot, draw(points, Path(recipe.origin).name, kind))
    if as_json:
        print_json({"method": recipe.method, "points": [{**asdict(entry), "share": entry.share} for entry in points]})
        return
    _print_sweep(points)
    if plot is not None and not settings.quiet:
        click.echo(f"drew {plot}")


def _print_sweep(points: "Sequence[Point]") -> None:
    """Print the curve as a table."""
    from mergefs.cli.output import print_table
    from mergefs.units import format_size

    rows = [
        (
            entry.budget,
            format_size(entry.planned),
            f"{entry.share:.1%}",
            f"{entry.error:.4f}",
            "-" if entry.bound is None else f"{entry.bound:.4f}",
            entry.plan_id,
        )
        for entry in points
    ]
    print_table(("budget", "bytes", "share", "predicted error", "at most", "plan"), rows, numeric=(1, 2, 3, 4))
    click.echo("errors are relative to the merged delta; no plan was kept: `mergefs plan --budget` keeps one")


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
