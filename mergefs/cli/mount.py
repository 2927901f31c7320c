"""``mergefs mount``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.options import (
    MERGEKIT_EPILOG,
    PlanArguments,
    cache_size_option,
    plan_arguments,
    verify_reads_option,
)
from mergefs.cli.settings import Settings, absolute

if TYPE_CHECKING:
    from mergefs.mount.tree import Tree


@click.command(name="mount", epilog=MERGEKIT_EPILOG)
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("mountpoint", metavar="MOUNTPOINT", type=click.Path(path_type=Path))
@plan_arguments
@click.option("--foreground", is_flag=True, help="Serve in this process, with the log on stderr (systemd, containers).")
@cache_size_option
@verify_reads_option
@click.option("--allow-other", is_flag=True, help="Let other users read the mount too.")
@click.option("--warm", is_flag=True, help="Gather in the background the statistics that reads will need.")
@click.option("--fsname", default="mergefs", hidden=True, help="What the list of mounts names as what is mounted.")
@click.pass_obj
def command(
    settings: Settings,
    recipes: tuple[Path, ...],
    mountpoint: Path,
    arguments: PlanArguments,
    foreground: bool,
    cache_size: int,
    verify_reads: bool,
    allow_other: bool,
    warm: bool,
    fsname: str,
) -> None:
    """Show merged models as a read-only directory.

    One RECIPE makes MOUNTPOINT the model's directory; several, or a directory of recipes, make one directory for each.
    The id of a plan, or its beginning, stands for the recipe that it was made from. Returns when the mount answers.
    """
    from mergefs.mount.daemon import MountOptions, refuse_sources_inside, serve
    from mergefs.mount.mountinfo import resolve_mountpoint
    from mergefs.mount.mountpoint import refuse_catalog_inside
    from mergefs.planner.plan_ids import names_plan

    target = resolve_mountpoint(mountpoint)
    paths = tuple(recipe if names_plan(recipe) else absolute(recipe) for recipe in recipes)

    def build() -> "Tree":
        """Build the tree; called in the process that serves it, because what this imports must not be forked."""
        from mergefs.catalog import default_location
        from mergefs.cli.progress import progress
        from mergefs.mount.build import BuildOptions, build_tree, notes, source_paths

        catalog = settings.catalog or default_location()
        refuse_catalog_inside(target, catalog)
        options = BuildOptions(
            plan=arguments.options(),
            catalog=catalog,
            cache_size=cache_size,
            mountpoint=target,
            warm=warm,
            verify_reads=verify_reads,
        )
        with progress(settings.quiet) as listener:
            tree = build_tree(paths, options, listener)
        try:
            refuse_sources_inside(target, source_paths(tree))
        except BaseException:
            tree.close()
            raise
        if not settings.quiet and not foreground:  # whose log has them, on the same stream
            for note in notes(tree):
                click.echo(f"note: {note}", err=True)
        return tree

    serve(
        MountOptions(
            mountpoint=target,
            foreground=foreground,
            allow_other=allow_other,
            log_file=settings.log_file,
            verbose=settings.verbose,
            source=fsname,
        ),
        build,
    )
