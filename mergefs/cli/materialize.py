"""``mergefs materialize``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.options import MERGEKIT_EPILOG, PlanArguments, multi_arguments, plan_arguments
from mergefs.cli.settings import Settings, absolute

if TYPE_CHECKING:
    from mergefs.materialize.materialize import Materialized
    from mergefs.planner.plan import MergePlan

_CACHE_SIZE = 256 * 2**20
"""Blocks are used once, so only those at the edges of a chunk need keeping."""


@click.command(name="materialize", epilog=MERGEKIT_EPILOG)
@click.argument("paths", metavar="RECIPE... OUT", nargs=-1, required=True, type=click.Path(path_type=Path))
@plan_arguments
@multi_arguments
@click.option("--out-path", metavar="OUT", type=click.Path(path_type=Path), hidden=True)
@click.option("--overwrite", is_flag=True, help="Replace a model that is there, in one step.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    paths: tuple[Path, ...],
    arguments: PlanArguments,
    out_path: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write merged models to disk, each all or nothing.

    One RECIPE is written to OUT itself; several, or a directory of recipes, to a directory each below OUT. The bytes
    are those that a mount of the same recipe shows.
    """
    from mergefs.cli.output import print_json
    from mergefs.mount.build import expand_recipes
    from mergefs.mount.models import unique_names

    recipes, out = (paths, out_path) if out_path is not None else (paths[:-1], paths[-1])
    if not recipes:
        raise click.UsageError(f"there is no OUT beside {paths[0]}; name the directory to write the model to")
    files = expand_recipes(recipes)
    single = len(recipes) == 1 and not recipes[0].is_dir()
    destinations = [absolute(out) if single else absolute(out) / name for name in unique_names(files)]
    for recipe, destination in zip(files, destinations, strict=True):
        plan, result = _materialize(settings, recipe, destination, arguments, overwrite)
        if as_json:
            print_json({**asdict(result), **asdict(result.totals), "directory": str(result.directory)})
        elif not settings.quiet:
            _print(plan, result)


def _materialize(
    settings: Settings, recipe: Path, destination: Path, arguments: PlanArguments, overwrite: bool
) -> tuple["MergePlan", "Materialized"]:
    """Write one model."""
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.progress import progress
    from mergefs.cli.signals import ended_by_signals
    from mergefs.engine.workspace import Workspace
    from mergefs.materialize.materialize import materialize
    from mergefs.planner.build import make_plan
    from mergefs.recipe.model import load_recipe

    workspace = Workspace.create(Catalog(settings.catalog or default_location()), _CACHE_SIZE)
    try:
        with ended_by_signals(), progress(settings.quiet) as listener:
            plan = make_plan(load_recipe(recipe), arguments.options(), workspace, listener)
            return plan, materialize(plan, destination, workspace, overwrite, listener)
    finally:
        workspace.close()


def _print(plan: "MergePlan", result: "Materialized") -> None:
    """Print what was written and what it cost, for people."""
    from mergefs.cli.output import print_pairs
    from mergefs.units import format_size

    print_pairs(
        {
            "wrote": str(result.directory),
            "plan": result.plan_id,
            "size": f"{format_size(result.bytes_written)} in {result.files} files, {result.seconds:.1f} s",
            "experts read": f"{format_size(result.totals.expert_bytes_read)} of "
            f"{format_size(plan.outcome.expert_bytes_total)}",
            "base read": format_size(result.totals.base_bytes_read),
            "analysis read": format_size(result.totals.analysis_bytes_read),
        }
    )
    for note in plan.notes:
        click.echo(f"note: {note}")
