"""``mergefs catalog gc``."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.upkeep.collection import Collected


@click.command(name="gc")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--older-than",
    "days",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    metavar="DAYS",
    help="How long unused plans, unfinished work and models that are not there are kept.",
)
@click.option("--compact", is_flag=True, help="Also give free pages back to the disk.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_obj
def command(settings: Settings, dry_run: bool, days: int, compact: bool, as_json: bool) -> None:
    """Remove from the catalog what nothing needs any more, and show the space.

    What a mount shows, a run is at work on, or a model that is there could use, is kept; so is what runs have written.
    """
    from mergefs.catalog import Catalog, default_location
    from mergefs.cli.output import print_json
    from mergefs.mount.unmount import shown_plans
    from mergefs.upkeep.collection import collect
    from mergefs.upkeep.garbage import Needs

    with Catalog(settings.catalog or default_location()) as catalog:
        result = collect(catalog, Needs(shown_plans(), days), dry_run, compact)
    if as_json:
        print_json({"dry_run": dry_run, **asdict(result)})
    else:
        _print(result, dry_run)


def _print(result: "Collected", dry_run: bool) -> None:
    """Print what was removed, and the space before and after."""
    from mergefs.cli.output import print_note, print_table
    from mergefs.units import format_size

    verb = "would be removed" if dry_run else "removed"
    if result.removed:
        rows = [(one.kind, str(one.count), format_size(one.size)) for one in result.removed]
        print_table(("what", verb, "size"), rows, numeric=(1, 2))
    else:
        click.echo("nothing is there that is not needed")
    if not dry_run:
        kinds = [kind for kind, size in result.before.items() if size or result.after[kind]]
        sizes = [(kind, format_size(result.before[kind]), format_size(result.after[kind])) for kind in kinds]
        print_table(("space", "before", "after"), sizes, numeric=(1, 2))
    for sentence in result.kept:
        print_note(sentence)
