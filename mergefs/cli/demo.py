"""``mergefs demo``."""

from pathlib import Path

import click

from mergefs.cli.settings import Settings, absolute


@click.command(name="demo")
@click.argument("directory", metavar="[DIR]", default="mergefs-demo", type=click.Path(path_type=Path))
@click.pass_obj
def command(settings: Settings, directory: Path) -> None:
    """Train a small family of models, merge it by two recipes, mount the merges, and measure them.

    Takes some minutes on two cores and downloads nothing. Everything is kept below DIR (default: mergefs-demo).
    """
    from mergefs.evaluation.imports import missing_dependency

    try:
        from mergefs.demo.run import run_demo
    except ImportError as error:
        raise missing_dependency(error.name or "torch") from error
    run_demo(absolute(directory), settings.catalog)
