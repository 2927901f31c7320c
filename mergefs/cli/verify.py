"""``mergefs verify``."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergefs.cli.settings import Settings
from mergefs.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from mergefs.engine.workspace import Workspace
    from mergefs.materialize.recomputing import Sample
    from mergefs.materialize.verify import Verified
    from mergefs.progress import Progress


@click.command(name="verify")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Compute the weights from the sources again and compare every byte.")
@click.option("--sample", metavar="N|SHARE", help="With --deep: only so many pieces, or 5% of them, at random.")
@click.option("--all", "every", is_flag=True, help="Name every damaged piece, and not only the first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(settings: Settings, directory: Path, deep: bool, sample: str | None, every: bool, as_json: bool) -> None:
    """Check a materialized model against its manifest: sizes and hashes.

    What is damaged is named: the file, the piece of 1 MiB, and the tensor.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json
    from mergefs.cli.progress import progress
    from mergefs.engine.workspace import Workspace
    from mergefs.materialize.recomputing import Sample, verify_deep
    from mergefs.materialize.verify import verify
    from mergefs.units import format_size

    if sample is not None and not deep:
        raise UsageError("--sample says how much --deep computes again; give both")
    chosen = None if sample is None else Sample.parse(sample)
    resources = Workspace.create(Catalog(settings.catalog or default_location())) if deep else None
    try:
        with progress(settings.quiet) as listener:
            if every:
                result = _check_everything(directory, resources, chosen, listener, as_json)
            elif resources is not None:
                result = verify_deep(directory, resources, listener, chosen)
            else:
                result = verify(directory, listener)
    finally:
        if resources is not None:
            resources.close()
    if as_json:
        print_json({**asdict(result), "directory": str(result.directory), "damage": []})
        return
    size = format_size(result.bytes_checked)
    click.echo(f"{result.directory}: {result.files} files, {size}, as they were written: manifest {result.manifest}")
    if deep:
        click.echo(f"{format_size(result.recomputed_bytes)} of weights are what the sources give now")


def _check_everything(
    directory: Path, resources: "Workspace | None", sample: "Sample | None", listener: "Progress", as_json: bool
) -> "Verified":
    """Print all that is damaged, against the manifest and, where that is sound, the sources; VerificationError then."""
    from mergefs.cli.output import print_json
    from mergefs.materialize.manifest import read_manifest
    from mergefs.materialize.recomputing import recompute
    from mergefs.materialize.verify import Damage, find_damage, sound

    manifest = read_manifest(directory)
    damage = list(find_damage(directory, manifest, listener))
    recomputed = 0
    if resources is not None and not damage:
        for found in recompute(directory, resources, listener, sample):
            if isinstance(found, Damage):
                damage.append(found)
            else:
                recomputed += found
    if not damage:
        return replace(sound(directory, manifest), recomputed_bytes=recomputed)
    if as_json:
        print_json({"directory": str(directory), "damage": [{**asdict(one), "file": str(one.file)} for one in damage]})
    else:
        for one in damage:
            click.echo(one.sentence)
    what = "1 place is" if len(damage) == 1 else f"{len(damage)} places are"
    raise VerificationError(f"{directory}: {what} damaged; materialize the model again")
