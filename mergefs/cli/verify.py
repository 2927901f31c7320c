"""``mergefs verify``."""

from dataclasses import asdict
from pathlib import Path

import click

from mergefs.cli.settings import Settings


@click.command(name="verify")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Compute everything from the sources again and compare every byte.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(settings: Settings, directory: Path, deep: bool, as_json: bool) -> None:
    """Check a materialized model against its manifest: the size and the hash of every file."""
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.engine.workspace import Workspace
    from mergefs.materialize.verify import verify, verify_deep
    from mergefs.units import format_size

    with progress() as listener:
        if deep:
            resources = Workspace.create(Catalog(settings.catalog or default_location()))
            try:
                result = verify_deep(directory, resources, listener)
            finally:
                resources.close()
        else:
            result = verify(directory, listener)
    if as_json:
        print_json({**asdict(result), "directory": str(result.directory)})
        return
    how = "equal to what the sources give now" if result.deep else "as they were written"
    click.echo(f"{result.directory}: {result.files} files, {format_size(result.bytes_checked)}, {how}")
