"""``mergefs materialize``."""

from dataclasses import asdict
from pathlib import Path

import click

from mergefs.cli.options import max_shard_size_option, recipe_options
from mergefs.cli.settings import Settings, absolute

_CACHE_SIZE = 256 * 2**20
"""Blocks are used once, so only those at the edges of a chunk need keeping."""


@click.command(name="materialize")
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@recipe_options
@max_shard_size_option
@click.option("--overwrite", is_flag=True, help="Replace a model that is there, in one step.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(
    settings: Settings,
    recipes: tuple[Path, ...],
    out: Path,
    budget: str | None,
    base: str | None,
    random_seed: int,
    max_shard_size: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write merged models to disk, each all or nothing.

    One RECIPE is written to OUT itself; several, or a directory of recipes, to a directory each below OUT. The bytes
    are those that a mount of the same recipe shows.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json, print_pairs
    from mergefs.cli.progress import progress
    from mergefs.cli.signals import ended_by_signals
    from mergefs.engine.workspace import Workspace
    from mergefs.materialize.materialize import materialize
    from mergefs.mount.build import expand_recipes
    from mergefs.mount.models import unique_names
    from mergefs.planner.build import PlanOptions, make_plan
    from mergefs.recipe.model import load_recipe
    from mergefs.units import format_size

    options = PlanOptions(budget, base, random_seed, max_shard_size)
    files = expand_recipes(recipes)
    single = len(recipes) == 1 and not recipes[0].is_dir()
    destinations = [absolute(out) if single else absolute(out) / name for name in unique_names(files)]
    for recipe, destination in zip(files, destinations, strict=True):
        resources = Workspace.create(Catalog(settings.catalog or default_location()), _CACHE_SIZE)
        try:
            with ended_by_signals(), progress() as listener:
                plan = make_plan(load_recipe(recipe), options, resources, listener)
                result = materialize(plan, destination, resources, overwrite, listener)
        finally:
            resources.close()
        if as_json:
            print_json({**asdict(result), **asdict(result.totals), "directory": str(result.directory)})
            continue
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
